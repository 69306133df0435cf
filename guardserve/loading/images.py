"""Reading the samples of a reference from a folder of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guardserve.exceptions import ModelLoadError, ReferenceProfileError, SettingsError
from guardserve.loading.preprocessing import MODES, ImagePreprocessing, pillow
from guardserve.signature import TensorSpec

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The images of a folder and the folders in it, in the order of their names, as batches for a model's input.

    Attributes:
        paths: The files.
        spec: The model's input, shape ``(N, channels, height, width)``.
        preprocessing: How a sample is made of each.
        batch_size: Images of a batch.
    """

    paths: tuple[Path, ...]
    spec: TensorSpec
    preprocessing: ImagePreprocessing
    batch_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the batches, in order.

        Raises:
            ReferenceProfileError: If a file is no image.
        """
        library = pillow()
        for start in range(0, len(self.paths), self.batch_size):
            images = [self._read(library, path) for path in self.paths[start : start + self.batch_size]]
            yield torch.stack(images)

    def _read(self, library: Any, path: Path) -> torch.Tensor:
        try:
            with library.open(path) as image:
                return self.preprocessing.apply(image, self.spec)
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything at bytes that are no image
            raise ReferenceProfileError(f"{path} cannot be read as an image: {error}") from error


def load_images(
    folder: Path,
    spec: TensorSpec,
    *,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    declared: ImagePreprocessing | None = None,
    batch_size: int = 32,
) -> ImageBatches:
    """Open a folder of images.

    Args:
        folder: The folder; those in it are read, too.
        spec: The model's input.
        size: Height and width to resize to, where the input leaves them free; to the whole of it.
        mean: What is taken off pixels from 0 to 1, one number or one for each channel; none for 0.
        std: What they are then divided by; none for 1.
        declared: The model's own preprocessing, taken if none of those is given and it gives images of one size.
        batch_size: Images of a batch; a model of one batch size gets that.

    Raises:
        MissingExtraError: If Pillow is not installed.
        ReferenceProfileError: If the input does not take images, or the folder has none.
    """
    pillow()
    shape = spec.shape
    if declared is not None and declared.size is not None and size is None and not mean and not std:
        return _batches(folder, spec, declared, batch_size)
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
    try:
        preprocessing = ImagePreprocessing((height, width), mean=tuple(mean) or (0.0,), std=tuple(std) or (1.0,))
        preprocessing.check(spec)
    except (SettingsError, ModelLoadError) as error:
        raise ReferenceProfileError(str(error)) from error
    return _batches(folder, spec, preprocessing, batch_size)


def _batches(folder: Path, spec: TensorSpec, preprocessing: ImagePreprocessing, batch_size: int) -> ImageBatches:
    paths = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()))
    if spec.shape[0] != -1:
        batch_size = spec.shape[0]
        paths = paths[: len(paths) // batch_size * batch_size]
    if not paths:
        raise ReferenceProfileError(f"{folder} has no image, or not a batch of them ({', '.join(SUFFIXES)})")
    return ImageBatches(paths, spec, preprocessing, batch_size)
