"""Images as model inputs: equal to torchvision's transforms, and hard to hurt."""

from __future__ import annotations

import contextlib
import importlib
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit.zoo import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from guardserve import example_input, image_preprocessing, load_model
from guardserve.exceptions import InputError, MissingExtraError, ModelLoadError, SettingsError
from guardserve.loading.preprocessing import ImagePreprocessing, TooLargeImageError, read_image
from guardserve.signature import TensorSpec

torchvision()
transforms: Any = importlib.import_module("torchvision.transforms")

COLOUR = TensorSpec("image", torch.float32, (-1, 3, -1, -1))
GREY = TensorSpec("image", torch.float32, (-1, 1, -1, -1))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return an image of noise over a slope."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    noise = np.random.default_rng(seed).integers(0, 128, shape, dtype=np.uint8)
    slope = np.linspace(0, 127, width).astype(np.uint8)
    return Image.fromarray(noise + (slope if mode == "L" else slope[:, None]))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Write an image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([None, 7, 32, (20, 30)]), st.sampled_from([None, 9, 32]))
def test_it_equals_torchvisions_transforms(width: int, height: int, resize: Any, crop: int | None) -> None:
    """Of any size, wide or tall, smaller or larger than the crop."""
    image = picture(width, height)
    steps: list[Any] = [] if resize is None else [transforms.Resize(resize)]
    steps += [] if crop is None else [transforms.CenterCrop(crop)]
    want = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
    ours = ImagePreprocessing(resize, crop, mean=MEAN, std=STD)
    got = read_image(encoded(image), "PNG", ours, COLOUR)
    assert torch.allclose(got, want.unsqueeze(0), atol=1e-6)


def test_a_photo_of_the_usual_size_equals_torchvisions_usual_transform() -> None:
    """Resize 256, crop 224, from a JPEG, as a decoder gives it."""
    data = encoded(picture(640, 427), "JPEG", quality=90)
    usual = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    want = transforms.Compose(usual)(Image.open(io.BytesIO(data)).convert("RGB"))
    spec = TensorSpec("image", torch.float32, (-1, 3, 224, 224))
    got = read_image(data, "JPEG", ImagePreprocessing(256, 224, mean=MEAN, std=STD), spec)
    assert got.shape == (1, 3, 224, 224)
    assert torch.allclose(got[0], want, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_of_any_colours_become_the_models(mode: str) -> None:
    """Grey for one channel, colours for three; transparency is left out."""
    image = picture(10, 8, mode)
    for spec, target in ((GREY, "L"), (COLOUR, "RGB")):
        want = transforms.ToTensor()(image.convert(target))
        assert torch.allclose(read_image(encoded(image), "PNG", ImagePreprocessing(), spec)[0], want, atol=1e-7)


def test_a_model_of_bytes_gets_the_pixels_as_they_are() -> None:
    """Also of half floats, rounded."""
    image = picture(5, 4)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    whole = ImagePreprocessing(scale=1)
    raw = TensorSpec("image", torch.uint8, (-1, 3, -1, -1))
    whole.check(raw)
    assert torch.equal(read_image(encoded(image), "PNG", whole, raw)[0], pixels)
    half = TensorSpec("image", torch.float16, (-1, 3, -1, -1))
    assert torch.equal(read_image(encoded(image), "PNG", whole, half)[0], pixels.half())


def chunk(kind: bytes, data: bytes) -> bytes:
    """Write a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """Write a PNG of a few bytes that says to be of some size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(2**15, 2**15), (2**31 - 1, 2**31 - 1), (2**26, 1)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    """By what the header says, however little follows."""
    with pytest.raises(TooLargeImageError, match=f"{width} x {height} pixels"):
        read_image(bomb(width, height), "PNG", ImagePreprocessing(), COLOUR)


def test_a_thin_image_is_not_resized_to_a_bomb() -> None:
    """The shorter side becomes 256, and the longer one would follow."""
    with pytest.raises(TooLargeImageError, match="would be resized to 25600000 x 256"):
        read_image(encoded(picture(100_000, 1)), "PNG", ImagePreprocessing(256), COLOUR)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_images_are_refused(kind: str) -> None:
    """Truncated anywhere, of another format, empty, or no image."""
    data = encoded(picture(64, 64), kind)
    other = {"PNG": "JPEG", "JPEG": "PNG"}[kind]
    for broken in (
        *(data[: len(data) * part // 8] for part in range(8)),
        encoded(picture(8, 8), other),
        b"GIF89a",
        b"\0" * 99,
    ):
        with pytest.raises(InputError, match=f"the {kind} image cannot be read"):
            read_image(broken, kind, ImagePreprocessing(), COLOUR)
    with pytest.raises(InputError, match="cannot be read"):
        read_image(bomb(100, 100), "PNG", ImagePreprocessing(), COLOUR)


@given(st.data())
def test_no_bytes_break_the_reader(data: st.DataObject) -> None:
    """A file with some bytes changed is an image or an InputError, never another error."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG"]))
    content = bytearray(encoded(picture(16, 16), kind))
    for index in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        assert read_image(bytes(content), kind, ImagePreprocessing(), COLOUR, 2**16).shape[:2] == (1, 3)


def test_pixels_of_16_bits_are_refused_rather_than_cut_off() -> None:
    """Pillow would make all that is above 255 white."""
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        read_image(encoded(image), "PNG", ImagePreprocessing(), GREY)


def test_an_image_of_another_size_than_the_models_is_refused() -> None:
    """Where the preprocessing leaves the size as it is."""
    spec = TensorSpec("image", torch.float32, (-1, 3, 8, -1))
    assert read_image(encoded(picture(30, 8)), "PNG", ImagePreprocessing(), spec).shape == (1, 3, 8, 30)
    with pytest.raises(InputError, match="9 x 30 after preprocessing"):
        read_image(encoded(picture(30, 9)), "PNG", ImagePreprocessing(), spec)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to install."""
    data = encoded(picture(8, 8))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"guardserve\[images\]"):
        read_image(data, "PNG", ImagePreprocessing(), COLOUR)


def test_a_text_says_the_same_as_the_decorator() -> None:
    """In any order, of which parts may be left out."""
    text = "resize=256 crop=224,200 mean=0.485,0.456,0.406 std=0.229,0.224,0.225 scale=1"
    assert ImagePreprocessing.parse(text) == ImagePreprocessing(256, (224, 200), 1.0, MEAN, STD)
    assert ImagePreprocessing.parse("") == ImagePreprocessing()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("size=3", "give each of resize, crop"),
        ("crop=3 crop=4", "once"),
        ("crop=big", "give numbers"),
        ("crop=0", "crop is 0"),
        ("resize=1,2,3", "resize is"),
        ("std=0", "positive numbers"),
        ("scale=nan", "positive numbers"),
    ],
)
def test_a_text_that_says_nothing_is_refused(text: str, says: str) -> None:
    """With what it may say."""
    with pytest.raises(SettingsError, match=says):
        ImagePreprocessing.parse(text)


@pytest.mark.parametrize(
    ("options", "spec", "says"),
    [
        ({}, TensorSpec("x", torch.float32, (-1, 3)), "no batches of grey or colour"),
        ({}, TensorSpec("x", torch.float32, (-1, 4, 8, 8)), "no batches of grey or colour"),
        ({}, TensorSpec("x", torch.uint8, (-1, 3, 8, 8)), "with scale=1 alone"),
        ({"scale": 1}, TensorSpec("x", torch.int32, (-1, 3, 8, 8)), "with scale=1 alone"),
        ({"mean": (1.0, 2.0)}, COLOUR, "mean has 2 numbers"),
        ({"crop": 9}, TensorSpec("x", torch.float32, (-1, 3, 8, 8)), "gives 9 x 9"),
    ],
)
def test_a_preprocessing_that_does_not_fit_the_model_is_refused(
    options: dict[str, Any], spec: TensorSpec, says: str
) -> None:
    """When it is loaded, not at the first request."""
    with pytest.raises(ModelLoadError, match=says):
        ImagePreprocessing(**options).check(spec)


FACTORY = """
import torch
from torch import nn

from guardserve import example_input, image_preprocessing


@image_preprocessing(resize=9, crop=8, mean=[0.5], std=[0.25])
@example_input(torch.zeros(1, 3, 8, 8))
def declared():
    return nn.BatchNorm2d(3)


class Two(nn.Module):
    def forward(self, a, b):
        return a + b


@image_preprocessing()
@example_input(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
def two():
    return Two()
"""


def test_a_declaration_is_kept_with_the_loaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option overrides it; a model of two inputs can have none."""
    (tmp_path / "imagefactory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    want = ImagePreprocessing(9, 8, mean=(0.5,), std=(0.25,))
    assert load_model("imagefactory:declared", device="cpu").preprocessing == want
    given = load_model("imagefactory:declared", device="cpu", image_preprocessing="crop=8").preprocessing
    assert given == ImagePreprocessing(crop=8)
    assert load_model("demo", device="cpu").preprocessing is None
    with pytest.raises(ModelLoadError, match="for models with one input, but this one takes a, b"):
        load_model("imagefactory:two", device="cpu")


def test_a_decorator_returns_what_it_was_given() -> None:
    """A class or a function."""

    @image_preprocessing(resize=8)
    @example_input(torch.zeros(1, 3, 8, 8))
    class Model(nn.Module):
        """A model."""

    assert isinstance(Model(), nn.Module)
    with pytest.raises(SettingsError, match="resize is -1"):
        image_preprocessing(resize=-1)
