"""How images become a model's input: resized, cropped, scaled and standardised, as torchvision does it."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from guardserve.exceptions import InputError, MissingExtraError, ModelLoadError, SettingsError
from guardserve.signature import TensorSpec

MODES = {1: "L", 3: "RGB"}
"""Pillow's name of the pixels for each number of channels."""

WIDE_MODES = ("I", "F")
"""Beginnings of Pillow's names of pixels of more than 8 bits a channel, which it does not scale down but cuts off."""

MAX_PIXELS = 2**25
"""Most pixels of an image that is decoded."""

PLUGINS = {"JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"), "PNG": ("PIL.PngImagePlugin", "PngImageFile")}
"""What reads each format."""

PIXEL = 4
"""Bytes that Pillow takes for each pixel."""

FLOAT = 4
"""Bytes of each channel of a pixel as a number; there are two copies of them for a moment."""

IMAGE_DIMENSIONS = 4

_T = TypeVar("_T")


class TooLargeImageError(InputError):
    """An image has more pixels than are decoded."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """What makes a tensor of an image, as torchvision's Resize, CenterCrop, ToTensor and Normalize do, in this order.

    Attributes:
        resize: Length of the shorter side, or height and width, to resize to, bilinearly; None leaves the size.
        crop: Side of the square, or height and width, to cut out of the middle; what is not there is black.
        scale: What the pixels, from 0 to 255, are divided by.
        mean: What is then taken off them, one number or one for each channel.
        std: What they are then divided by, likewise.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    scale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value, value)
            if value is not None and (len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes)):  # noqa: PLR2004
                raise SettingsError(f"{name} is {value!r}: give a positive integer, or height and width")
        if not self.scale > 0 or not self.std or not all(value > 0 for value in self.std):
            raise SettingsError(f"scale is {self.scale} and std is {self.std}: give positive numbers")
        if not self.mean:
            raise SettingsError("mean is empty: give one number, or one for each channel")

    @classmethod
    def parse(cls, text: str) -> ImagePreprocessing:
        """Read ``resize=256 crop=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225``, of which any part may be left out.

        Raises:
            SettingsError: If that is not possible.
        """
        kinds: dict[str, Callable[[str], Any]] = {
            "resize": _sizes,
            "crop": _sizes,
            "scale": float,
            "mean": _numbers,
            "std": _numbers,
        }
        found: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in kinds or name in found:
                raise SettingsError(
                    f"image preprocessing {part!r}: give each of {', '.join(kinds)} once, as NAME=VALUE"
                )
            try:
                found[name] = kinds[name](value)
            except ValueError:
                raise SettingsError(f"image preprocessing {part!r}: give numbers, with commas between them") from None
        return cls(**found)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what comes out; None where that depends on the image."""
        return _pair(self.crop) or (self.resize if isinstance(self.resize, tuple) else None)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height that an image of some width and height is resized to."""
        if self.resize is None:
            return size
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(size) / min(size))
        return (self.resize, longer) if size[0] <= size[1] else (longer, self.resize)

    def check(self, spec: TensorSpec) -> None:
        """Check that what comes out fits a model's input.

        Raises:
            ModelLoadError: If it does not.
        """
        shape = spec.shape
        kind = str(spec.dtype).removeprefix("torch.")
        if len(shape) != IMAGE_DIMENSIONS or shape[1] not in MODES:
            raise ModelLoadError(
                f"input {spec.name!r} takes {kind} of shape {shape}, no batches of grey or colour images, "
                "(N, 1, height, width) or (N, 3, height, width): images cannot be preprocessed for it"
            )
        plain = self.scale == 1 and set(self.mean) == {0.0} and set(self.std) == {1.0}
        if not spec.dtype.is_floating_point and not (spec.dtype is torch.uint8 and plain):
            raise ModelLoadError(f"input {spec.name!r} takes {kind}: give it pixels as they are, with scale=1 alone")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, shape[1]):
                raise ModelLoadError(
                    f"{name} has {len(values)} numbers, but input {spec.name!r} has {shape[1]} channels"
                )
        if self.size is not None and any(want not in (-1, got) for want, got in zip(shape[2:], self.size, strict=True)):
            raise ModelLoadError(
                f"the image preprocessing gives {self.size[0]} x {self.size[1]}, but input {spec.name!r} takes "
                f"{shape[2]} x {shape[3]}, where -1 is any size"
            )

    def apply(self, image: Any, spec: TensorSpec) -> torch.Tensor:
        """Make a tensor of one image of Pillow's, of the shape and type of a sample.

        Raises:
            ValueError: If its pixels have more than 8 bits a channel.
        """
        if image.mode.startswith(WIDE_MODES):
            raise ValueError(f"its pixels are {image.mode}, of more than 8 bits a channel: convert it")
        image = image.convert(MODES[spec.shape[1]])
        if self.resize is not None:
            image = image.resize(self.resized(image.size), pillow().Resampling.BILINEAR)
        if (crop := _pair(self.crop)) is not None:
            left, top = (_margin(size, wanted) for size, wanted in zip(image.size, reversed(crop), strict=True))
            image = image.crop((left, top, left + crop[1], top + crop[0]))
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
        if spec.dtype is torch.uint8:
            return pixels.contiguous()
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return pixels.float().div_(self.scale).sub_(mean).div_(std).contiguous().to(spec.dtype)


def image_preprocessing(
    *,
    resize: int | tuple[int, int] | None = None,
    crop: int | tuple[int, int] | None = None,
    scale: float = 255.0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> Callable[[_T], _T]:
    """Declare how images become the only input of a factory's model, so that it can be served images as they are.

    It goes beside ``@example_input``. The steps are those of torchvision in evaluation: see
    :class:`ImagePreprocessing` for them and for the arguments.

    Returns:
        A decorator that sets the attribute ``image_preprocessing`` and returns what it was given.

    Raises:
        SettingsError: If a value cannot be used.
    """
    declared = ImagePreprocessing(resize, crop, scale, tuple(map(float, mean)), tuple(map(float, std)))

    def declare(target: _T) -> _T:
        target.image_preprocessing = declared  # type: ignore[attr-defined]
        return target

    return declare


def find_preprocessing(*holders: object) -> ImagePreprocessing | None:
    """Return the preprocessing that the first of some objects declares, or None when none does."""
    for holder in holders:
        found = getattr(holder, "image_preprocessing", None)
        if isinstance(found, ImagePreprocessing):
            return found
    return None


def read_image(
    data: bytes,
    kind: str,
    preprocessing: ImagePreprocessing,
    spec: TensorSpec,
    max_pixels: int = MAX_PIXELS,
    *,
    hold: Callable[[int], object] = abs,
) -> torch.Tensor:
    """Make a batch of one of an encoded image.

    Args:
        data: The file's bytes.
        kind: What they are, ``"JPEG"`` or ``"PNG"``; other formats are not even looked at.
        preprocessing: How to make a sample of it.
        spec: The model's input.
        max_pixels: Most pixels that it may have, as its header tells before anything is decoded.
        hold: Told of the bytes that it takes, before it is decoded; what it raises is raised.

    Raises:
        MissingExtraError: If Pillow is not installed.
        TooLargeImageError: If it has more pixels.
        InputError: If it is no such image, is damaged, or does not fit the input.
    """
    pillow()
    with _reading(kind):
        image = _opened(data, kind)
    with image:
        _check_size("has", image.size, max_pixels)
        resized = preprocessing.resized(image.size)
        _check_size("would be resized to", resized, max_pixels)
        hold(PIXEL * (math.prod(image.size) + math.prod(resized)) + 2 * FLOAT * spec.shape[1] * math.prod(resized))
        with _reading(kind):
            image.load()
            sample = preprocessing.apply(image, spec)
    if any(want not in (-1, got) for want, got in zip(spec.shape[1:], sample.shape, strict=True)):
        raise InputError(
            f"the image is {sample.shape[1]} x {sample.shape[2]} after preprocessing, but input {spec.name!r} takes "
            f"{spec.shape[2]} x {spec.shape[3]}, where -1 is any size"
        )
    return sample.unsqueeze(0)


@contextmanager
def _reading(kind: str) -> Iterator[None]:
    """Raise an InputError for whatever a decoder raises at bytes that were made to break it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"the {kind} image cannot be read: {error}") from error


def _check_size(what: str, size: tuple[int, int], max_pixels: int) -> None:
    if math.prod(size) > max_pixels:
        raise TooLargeImageError(f"the image {what} {size[0]} x {size[1]} pixels, more than the {max_pixels} allowed")


def _opened(data: bytes, kind: str) -> Any:
    """Open an image by its header; by its own plugin, as its size is not for a global limit of Pillow's to judge."""
    plugin, name = PLUGINS[kind]
    return getattr(importlib.import_module(plugin), name)(io.BytesIO(data))


def _margin(size: int, wanted: int) -> int:
    """Return where a crop of the middle begins; before 0 where there is less than is wanted."""
    return -((wanted - size) // 2) if wanted > size else round((size - wanted) / 2)


def _pair(value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (value, value) if isinstance(value, int) else value


def _sizes(text: str) -> int | tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    return sizes[0] if len(sizes) == 1 else sizes


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def pillow() -> Any:
    """Import Pillow.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise MissingExtraError("Reading images", "images") from error
