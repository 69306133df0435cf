"""Comparing what a model returns for the same sample in two different batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from guardserve.nonfinite import named_tensors

# what rounding may change between two batches of one size, as a part of the largest value
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# another batch size may mean other kernels, whose rounding a deep model amplifies
_OTHER_SIZE = 1e-2
# a sample whose values are nearly all zero is measured by this part of the largest value in its batch
_SMALL = 1e-3


class Part(NamedTuple):
    """The part of an output tensor that belongs to one sample.

    Attributes:
        path: Where the tensor is in the output.
        values: The sample's part of it.
        largest: The largest absolute value in the whole tensor.
    """

    path: str
    values: torch.Tensor
    largest: float


@dataclass(frozen=True)
class Difference:
    """The worst difference between two outputs for one sample.

    Attributes:
        path: Where in the output it is.
        part: The difference as a part of the sample's largest value there.
        tolerance: What rounding may explain.
    """

    path: str
    part: float
    tolerance: float

    @property
    def is_real(self) -> bool:
        """Whether rounding does not explain it."""
        return self.part > self.tolerance

    def __str__(self) -> str:
        return f"{self.path} changes by {self.part:.2g} of its largest value (tolerance {self.tolerance:g})"


def tolerance(dtypes: Iterable[torch.dtype], *, same_size: bool) -> float:
    """Return the difference that rounding may explain where a model computes with these types."""
    rounding = max((_ROUNDING.get(dtype.to_real(), 0.0) for dtype in dtypes), default=0.0)
    return rounding if same_size else max(_OTHER_SIZE, 3 * rounding)


def sample_of(output: Any, place: int, rows: int, alone: Mapping[str, torch.Size] | None = None) -> Iterator[Part]:
    """Yield the parts of an output that belong to one sample of a batch.

    A tensor's batch axis is the one that is ``rows`` times as long as for a sample alone; when that is not known it is
    the first one, if its length is a multiple of ``rows``. A list with an entry for each sample has its entry.

    Args:
        output: What the model returned for the batch.
        place: Place of the sample in the batch.
        rows: Number of samples in the batch.
        alone: Shapes of what the model returned for one sample alone, by path.
    """
    for path, tensor, axis in _axes(output, place, rows, alone, "output"):
        if axis is not None:
            values = tensor.narrow(axis[0], place * axis[1], axis[1]) if axis[1] else tensor
            yield Part(path, values, _largest(tensor))


def shared_of(output: Any, rows: int, alone: Mapping[str, torch.Size] | None = None) -> Iterator[Part]:
    """Yield the parts of an output that belong to the batch as a whole; see :func:`sample_of`."""
    for path, tensor, axis in _axes(output, 0, rows, alone, "output"):
        if axis is None and tensor.numel():
            yield Part(path, tensor, _largest(tensor))


_WHOLE = (0, 0)
"""The axis and the length for one sample of a tensor that belongs to one sample as it is."""


def _axes(
    output: Any, place: int, rows: int, alone: Mapping[str, torch.Size] | None, path: str
) -> Iterator[tuple[str, torch.Tensor, tuple[int, int] | None]]:
    """Yield the path of each tensor for a sample alone, the tensor, and its batch axis with its length for a sample."""
    if isinstance(output, torch.Tensor):
        if alone is None:
            axis = (0, len(output) // rows) if output.ndim and len(output) and len(output) % rows == 0 else None
        else:
            axis = _batch_axis(output.shape, alone[path], rows) if path in alone else None
        yield path, output, axis
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from _axes(item, place, rows, alone, f"{path}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        if alone is not None and len(output) == rows and _one_entry(alone, path):
            yield from ((name, tensor, _WHOLE) for name, tensor in named_tensors(output[place], f"{path}[0]"))
            return
        for index, item in enumerate(output):
            yield from _axes(item, place, rows, alone, f"{path}[{index}]")
    else:
        yield from ((name, tensor, None) for name, tensor in named_tensors(output, path))


def whole(output: Any, path: str = "output") -> Iterator[Part]:
    """Yield an output for one sample alone, all of which belongs to it."""
    for name, tensor in named_tensors(output, path):
        yield Part(name, tensor, _largest(tensor))


def shapes_of(output: Any) -> dict[str, torch.Size]:
    """Return the shapes of an output's tensors by path."""
    return {path: tensor.shape for path, tensor in named_tensors(output)}


def _one_entry(alone: Mapping[str, torch.Size], path: str) -> bool:
    """Tell whether a list holds one entry for a sample alone."""
    inside = [name for name in alone if name.startswith(f"{path}[")]
    return bool(inside) and all(name.startswith(f"{path}[0]") for name in inside)


def _batch_axis(shape: torch.Size, alone: torch.Size, rows: int) -> tuple[int, int] | None:
    """Return the batch axis and its length for one sample."""
    if len(shape) != len(alone):
        return None
    differing = [axis for axis, (size, one) in enumerate(zip(shape, alone, strict=True)) if size != one]
    if len(differing) != 1 or shape[differing[0]] != rows * alone[differing[0]]:
        return None
    return differing[0], alone[differing[0]]


def lost_axis(output: Any, alone: Any, rows: int) -> tuple[str, torch.Size, torch.Size] | None:
    """Find an output whose batch axis is missing for one sample: its path, and its shapes in a batch and alone."""
    shapes = shapes_of(alone)
    for path, shape in shapes_of(output).items():
        if path in shapes and shape == (rows, *shapes[path]):
            return path, shape, shapes[path]
    return None


def worst_difference(one: Iterable[Part], other: Iterable[Part], allowed: float, *, labels: bool) -> Difference | None:
    """Compare two outputs for one sample.

    Args:
        one: Its parts in one batch.
        other: Its parts in another.
        allowed: The tolerance.
        labels: Whether to compare integers too, which rounding may flip between batches of different sizes.

    Returns:
        The worst difference, or None when there is nothing to compare.
    """
    others = {part.path: part for part in other}
    differences = []
    for part in one:
        match = others.get(part.path)
        if match is None or match.values.shape != part.values.shape or not part.values.numel():
            continue
        if _is_real_or_complex(part.values):
            differences.append(Difference(part.path, _difference(part, match), allowed))
        elif labels:
            differences.append(Difference(part.path, float(not torch.equal(part.values, match.values)), 0.0))
    return max(differences, key=lambda difference: difference.part, default=None)


def _difference(one: Part, other: Part) -> float:
    """Return the largest difference as a part of the largest value."""
    first, second = _wide(one.values), _wide(other.values)
    finite = first.isfinite()
    if not torch.equal(finite, second.isfinite()):
        return math.inf
    first, second = first[finite], second[finite]
    if not first.numel():
        return 0.0
    scale = max(first.abs().max().item(), second.abs().max().item(), _SMALL * one.largest, _SMALL * other.largest)
    return (first - second).abs().max().item() / scale if scale else 0.0


def _largest(tensor: torch.Tensor) -> float:
    if not _is_real_or_complex(tensor) or tensor.is_meta:
        return 0.0
    values = _wide(tensor)
    finite = values[values.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return values in double precision on the CPU."""
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def _is_real_or_complex(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
