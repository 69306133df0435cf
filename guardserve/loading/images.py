"""Reading the samples of a reference from a folder of images."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardserve.exceptions import MissingExtraError, ReferenceProfileError
from guardserve.signature import TensorSpec

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

MODES = {1: "L", 3: "RGB"}
"""Pillow's name of the pixels for each number of channels."""


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The images of a folder and the folders in it, in the order of their names, as batches for a model's input.

    Each is resized to the whole of the input, its pixels scaled to 0 to 1, less ``mean`` and divided by ``std``.

    Attributes:
        paths: The files.
        spec: The model's input, shape ``(N, channels, height, width)``.
        size: Height and width.
        mean: Of each channel, or one for all.
        std: Of each channel, or one for all.
        batch_size: Images of a batch.
    """

    paths: tuple[Path, ...]
    spec: TensorSpec
    size: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor
    batch_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the batches, in order.

        Raises:
            ReferenceProfileError: If a file is no image.
        """
        pillow = _pillow()
        for start in range(0, len(self.paths), self.batch_size):
            images = [self._read(pillow, path) for path in self.paths[start : start + self.batch_size]]
            yield torch.stack(images).to(self.spec.dtype)

    def _read(self, pillow: Any, path: Path) -> torch.Tensor:
        height, width = self.size
        try:
            with pillow.open(path) as image:
                pixels = np.asarray(
                    image.convert(MODES[self.spec.shape[1]]).resize((width, height), pillow.Resampling.BILINEAR)
                )
        except (OSError, ValueError, pillow.DecompressionBombError) as error:
            raise ReferenceProfileError(f"{path} cannot be read as an image: {error}") from error
        scaled = torch.from_numpy(pixels.astype(np.float32) / 255).reshape(height, width, -1).permute(2, 0, 1)
        return (scaled - self.mean) / self.std


def load_images(
    folder: Path,
    spec: TensorSpec,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    batch_size: int = 32,
) -> ImageBatches:
    """Open a folder of images.

    Args:
        folder: The folder; those in it are read, too.
        spec: The model's input.
        size: Height and width to resize to, where the input leaves them free.
        mean: What is taken off pixels from 0 to 1, one number or one for each channel; none for 0.
        std: What they are then divided by; none for 1.
        batch_size: Images of a batch; a model of one batch size gets that.

    Raises:
        MissingExtraError: If Pillow is not installed.
        ReferenceProfileError: If the input does not take images, or the folder has none.
    """
    _pillow()
    shape = spec.shape
    if len(shape) != 4 or shape[1] not in MODES or not spec.dtype.is_floating_point:  # noqa: PLR2004 - N, C, H, W
        raise ReferenceProfileError(
            f"input {spec.name!r} takes {str(spec.dtype).removeprefix('torch.')} of shape {shape}, no batches of grey "
            "or colour images in floating point: give the samples as an array (.npy, .npz or .safetensors)"
        )
    height, width = (size or -1 if want == -1 else want for want in shape[2:])
    if -1 in (height, width) or (size is not None and (height, width) != (size, size)):
        raise ReferenceProfileError(
            f"input {spec.name!r} takes images of {shape[2]} x {shape[3]} (-1 is any size), size is {size}: "
            "give the size that requests in production have"
        )
    if not all(value > 0 for value in std):
        raise ReferenceProfileError(f"std is {tuple(std)}: give positive numbers")
    paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    if spec.shape[0] != -1:
        batch_size = spec.shape[0]
        paths = paths[: len(paths) // batch_size * batch_size]
    if not paths:
        raise ReferenceProfileError(f"{folder} has no image, or not a batch of them ({', '.join(SUFFIXES)})")
    channels = shape[1]
    return ImageBatches(
        paths,
        spec,
        (height, width),
        _constants("mean", mean or (0.0,), channels),
        _constants("std", std or (1.0,), channels),
        batch_size,
    )


def _constants(name: str, values: Sequence[float], channels: int) -> torch.Tensor:
    if len(values) not in (1, channels):
        raise ReferenceProfileError(
            f"{name} has {len(values)} numbers: give one, or one for each of {channels} channels"
        )
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise MissingExtraError("A folder of images as a reference", "images") from error
