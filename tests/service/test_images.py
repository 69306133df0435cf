"""Images as they are over HTTP: the answer of the tensor that they stand for, or a refusal that says why."""

from __future__ import annotations

import gzip
import io
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving import command, loaded, metric, wait_until
from torch import nn

from guardserve.loading import ImagePreprocessing
from guardserve.loading.preprocessing import read_image
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.limits import Limits
from guardserve.signature import TensorSpec

INFER = "/v2/models/net/infer"
SPEC = TensorSpec("image", torch.float32, (-1, 3, 8, 8))
HOW = ImagePreprocessing(10, 8, mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))


def net() -> nn.Sequential:
    """Return a small model of images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4)).eval()


@contextmanager
def serving(how: ImagePreprocessing | None = HOW, **limits: Any) -> Iterator[httpx.Client]:
    """Serve it to those who send images."""
    runtime = Runtime(replace(loaded(net(), SPEC), preprocessing=how))
    app = create_app(runtime, limits=Limits(**limits))
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: runtime.failure is None)
        yield client


def picture(kind: str, width: int = 30, height: int = 20) -> bytes:
    """Return an image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def headers(kind: str, **more: str) -> dict[str, str]:
    """Return the headers of an image."""
    return {"Content-Type": f"image/{kind.lower()}", **more}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_gets_the_answer_of_its_tensor(kind: str) -> None:
    """In JSON, or in binary to whom accepts it; compressed once more, too."""
    data = picture(kind)
    with torch.no_grad():
        want = net()(read_image(data, kind, HOW, SPEC)).numpy()
    with serving() as client:
        answer = client.post(INFER, content=data, headers=headers(kind))
        assert answer.status_code == 200
        (output,) = answer.json()["outputs"]
        assert output["shape"] == [1, 4]
        np.testing.assert_allclose(np.array(output["data"], np.float32).reshape(1, 4), want, rtol=1e-5)
        packed = headers(kind, **{"Content-Encoding": "gzip"})
        assert client.post(INFER, content=gzip.compress(data), headers=packed).json() == answer.json()
        binary = client.post(INFER, content=data, headers=headers(kind, Accept="application/octet-stream"))
        size = int(binary.headers["inference-header-content-length"])
        np.testing.assert_allclose(np.frombuffer(binary.content[size:], np.float32), want[0], rtol=1e-5)
        assert client.post("/v2/models/net/versions/1/infer", content=data, headers=headers(kind)).status_code == 200
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 4


def test_what_is_no_image_that_can_be_read_is_refused_with_the_reason() -> None:
    """400, 413 or 415 in the protocol's form, counted; tensors are served as before."""
    png, jpeg = picture("PNG"), picture("JPEG")
    large = png[:16] + struct.pack(">II", 2**16, 2**16) + png[24:]
    with serving() as client:
        for content, kind, status, says in (
            (png[:-40], "png", 400, "the PNG image cannot be read"),
            (jpeg[:-100], "jpeg", 400, "the JPEG image cannot be read"),
            (png, "jpeg", 400, "the JPEG image cannot be read"),
            (b"", "png", 400, "the PNG image cannot be read"),
            (large, "png", 400, "cannot be read"),  # its checksum is wrong
            (png, "webp", 415, "send image/jpeg or image/png"),
        ):
            answer = client.post(INFER, content=content, headers=headers(kind))
            assert (answer.status_code, list(answer.json())) == (status, ["error"])
            assert says in answer.json()["error"]
        tensor = {"name": "image", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0.0] * 192}
        assert client.post(INFER, json={"inputs": [tensor]}).status_code == 200
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="invalid_input"}') == 5
    with serving(max_image_pixels=599) as client:
        answer = client.post(INFER, content=png, headers=headers("png"))
        assert answer.status_code == 413
        assert "30 x 20 pixels, more than the 599 allowed" in answer.json()["error"]


def test_a_model_that_declares_no_images_takes_none() -> None:
    """415, and its document does not offer it."""
    with serving(None) as client:
        answer = client.post(INFER, content=picture("PNG"), headers=headers("png"))
        assert answer.status_code == 415
        assert "declares no image preprocessing" in answer.json()["error"]
        assert "image/png" not in client.get("/openapi.json").text
    with serving() as client:
        assert "image/png" in client.get("/openapi.json").text


def test_without_pillow_the_answer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """415: the model would take it, but this server cannot."""
    data = picture("PNG")
    with serving() as client:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        answer = client.post(INFER, content=data, headers=headers("png"))
        assert answer.status_code == 415
        assert "guardserve[images]" in answer.json()["error"]


def test_the_command_takes_the_preprocessing_of_a_file_as_an_option(tmp_path: Path) -> None:
    """An exported program declares none; the client gets what torch gives for the same pixels."""
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(net(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=(rows,))
    torch.export.save(program, tmp_path / "exported.pt2")
    how = "resize=10 crop=8 mean=0.5,0.4,0.3 std=0.25,0.5,1"
    options = ["--image-preprocessing", how, "--log-level", "error"]
    data = picture("PNG")
    with torch.no_grad():
        want = net()(read_image(data, "PNG", HOW, SPEC)).numpy()
    with command("serve", str(tmp_path / "exported.pt2"), *options, cwd=tmp_path) as url:
        answer = httpx.post(f"{url}/v2/models/exported/infer", content=data, headers=headers("png"), trust_env=False)
        (output,) = answer.json()["outputs"]
        np.testing.assert_allclose(np.array(output["data"], np.float32), want[0], rtol=1e-4)
