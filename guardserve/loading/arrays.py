"""Reading the samples of a reference from a file of arrays; none of the formats can run code."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from guardserve.exceptions import ReferenceProfileError
from guardserve.signature import TensorSpec

SUFFIXES = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True, eq=False)
class ArrayBatches:
    """The samples of a file, as batches for a model's input.

    Attributes:
        samples: All samples, the first axis counting them.
        dtype: Element type of the model's input.
        batch_size: Samples of a batch.
    """

    samples: npt.NDArray[np.generic]
    dtype: torch.dtype
    batch_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the batches, in order."""
        for start in range(0, len(self.samples), self.batch_size):
            yield torch.from_numpy(np.array(self.samples[start : start + self.batch_size])).to(self.dtype)


def load_batches(path: Path, spec: TensorSpec, batch_size: int = 32) -> ArrayBatches:
    """Open a file with one array of samples: ``.npy`` (not read whole), ``.npz`` or ``.safetensors``.

    Args:
        path: The file. If it holds several arrays, the one that is named as the model's input is taken.
        spec: The model's input.
        batch_size: Samples of a batch; a model of one batch size gets that.

    Raises:
        ReferenceProfileError: If the file cannot be read, or its array does not fit the input.
    """
    array = _choose(path, _arrays(path), spec)
    expected = spec.shape[1:]
    fits = array.ndim == len(spec.shape) and all(want in (-1, size) for want, size in zip(expected, array.shape[1:]))  # noqa: B905
    if not fits:
        raise ReferenceProfileError(
            f"{path} has shape {array.shape}, but input {spec.name!r} takes samples of shape {expected} "
            "(-1 is any size): give one sample in each entry of the first axis"
        )
    floats = (array.dtype.kind == "f", spec.dtype.is_floating_point)
    if array.dtype.kind not in "fiub" or floats[0] != floats[1]:
        raise ReferenceProfileError(
            f"{path} holds {array.dtype}, but input {spec.name!r} takes {str(spec.dtype).removeprefix('torch.')}: "
            "prepare the samples exactly as the requests in production are"
        )
    if spec.shape[0] != -1:
        batch_size = spec.shape[0]
        array = array[: len(array) // batch_size * batch_size]
    return ArrayBatches(array, spec.dtype, batch_size)


def _arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    if path.suffix not in SUFFIXES:
        raise ReferenceProfileError(f"{path} is none of {', '.join(SUFFIXES)}: save the samples as one array")
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        return dict(load_file(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise ReferenceProfileError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _choose(path: Path, arrays: dict[str, npt.NDArray[np.generic]], spec: TensorSpec) -> npt.NDArray[np.generic]:
    if spec.name in arrays:
        return arrays[spec.name]
    if len(arrays) != 1:
        raise ReferenceProfileError(
            f"{path} holds the arrays {', '.join(sorted(arrays)) or 'none'}: name one as the input, {spec.name!r}"
        )
    return next(iter(arrays.values()))
