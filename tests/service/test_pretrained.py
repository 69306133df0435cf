"""Real input: a pretrained MobileNetV2 behind the command line, labelled photos, and the real tritonclient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mobilenet
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from serving import command
from torch import nn

CORRECT_IN_EVAL = 17


@pytest.fixture(scope="module", params=["mobilenet_v2", "mobilenet_v2_left_training"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Serve the pretrained model from its factory and checkpoint; give the server's address and the model's name."""
    name = str(request.param)
    tests = Path(mobilenet.__file__).parent
    arguments = ["serve", f"mobilenet:{name}", "--weights", str(mobilenet.weights()), "--threads", "1"]
    with command(*arguments, cwd=tests, env={**os.environ, "GUARDSERVE_LOG_LEVEL": "error"}) as url:
        yield url.removeprefix("http://"), name


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_photos_get_the_right_class_one_by_one(served: tuple[str, str], *, binary: bool) -> None:
    """17 of the 20 photos at least, at batch size 1, also when the factory left the model in training mode."""
    address, name = served
    photos, labels = mobilenet.photos()
    correct = 0
    with triton.InferenceServerClient(address, network_timeout=60, connection_timeout=60) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(name)
        assert client.get_model_metadata(name)["inputs"] == [
            {"name": "image", "datatype": "FP32", "shape": [-1, 3, 224, 224]}
        ]
        for photo, label in zip(photos, labels, strict=True):
            image = triton.InferInput("image", [1, 3, 224, 224], "FP32")
            image.set_data_from_numpy(photo[None].numpy(), binary_data=binary)
            output = triton.InferRequestedOutput("output", binary_data=binary)
            logits = client.infer(name, [image], outputs=[output], request_id="photo").as_numpy("output")
            correct += int(np.argmax(logits) == label)
    assert correct >= CORRECT_IN_EVAL


def test_without_the_guard_the_model_left_training_recognises_nothing() -> None:
    """The hazard is real: at batch size 1 batch statistics give 0 of 20, with finite outputs."""
    photos, labels = mobilenet.photos()
    model: nn.Module = mobilenet.mobilenet_v2_left_training()
    model.load_state_dict(torch.load(mobilenet.weights(), weights_only=True))
    with torch.no_grad():
        outputs = [model(photo[None]) for photo in photos]
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert sum(int(output.argmax() == label) for output, label in zip(outputs, labels, strict=True)) == 0
