"""Finding NaN and infinity in what a model returns."""

from __future__ import annotations

import cmath
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

try:
    from guardserve.native import is_finite as _quick
except ImportError:  # it was not compiled

    def _quick(x: object, /) -> bool | None:
        del x
        return None


@dataclass(frozen=True)
class NonFinite:
    """The non-finite values of one tensor.

    Attributes:
        path: Where the tensor sits in the output, such as ``output`` or ``output['logits'][0]``.
        count: Number of values that are NaN or infinite.
        total: Number of values.
        rows: Indices along the first axis that hold at least one of them; ``(0,)`` for a scalar.
        first: Index of the first of them.
    """

    path: str
    count: int
    total: int
    rows: tuple[int, ...]
    first: tuple[int, ...]

    def __str__(self) -> str:
        values = "value" if self.count == 1 else "values"
        return f"{self.path} holds {self.count} non-finite {values} of {self.total}, the first at index {self.first}"


def named_tensors(
    value: object, path: str = "output", leaf: Callable[[object], torch.Tensor | None] = lambda _: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a nested output with its path.

    Walks mappings, lists, tuples, deques, sets and the attributes of objects that are neither modules nor functions;
    anything else holds no tensors, or ``leaf`` makes it one.
    """
    yield from _walk(value, path, leaf, ())


def _walk(
    value: object, path: str, leaf: Callable[[object], torch.Tensor | None], within: tuple[object, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]", leaf, within)
    elif isinstance(value, (list, tuple, deque, AbstractSet)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]", leaf, within)
    elif (made := leaf(value)) is not None:
        yield path, made
    elif not any(value is outer for outer in within):
        for name, item in _attributes(value).items():
            yield from _walk(item, f"{path}.{name}", leaf, (*within, value))


def _attributes(value: object) -> dict[str, object]:
    """Return what an object holds, if it is one of data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(value) or isinstance(value, ModuleType):
        return {}
    return getattr(value, "__dict__", {})


def _numbers(value: object) -> torch.Tensor | None:
    """Return a number, or an array of them, as a tensor; None for what cannot be NaN or infinite."""
    if isinstance(value, (float, complex)):
        return torch.tensor(value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fc":
        widest = np.complex128 if value.dtype.kind == "c" else np.float64
        return torch.from_numpy(np.asarray(value, widest, order="C"))
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity.

    A finite sum proves it in one pass without a temporary; only a sum that overflowed needs a second look.
    """
    known = _quick(tensor)
    if known is not None:
        return known
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return True
    values = _plain(tensor)
    return cmath.isfinite(values.sum().item()) or bool(values.isfinite().all())


def find_nonfinite(value: object, path: str = "output") -> Iterator[NonFinite]:
    """Yield a :class:`NonFinite` for every tensor, array or number in a nested output that is or holds such a value."""
    for name, tensor in named_tensors(value, path, _numbers):
        if is_finite(tensor):
            continue
        # nothing here grows with the number of bad values: a hostile input may be nothing else
        bad = ~_plain(tensor.detach()).isfinite()
        flat = bad.flatten()
        rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if bad.ndim else [0]
        first = _index(int(flat.to(torch.uint8).argmax()), bad.shape)
        yield NonFinite(name, int(flat.sum()), flat.numel(), tuple(rows), first)


def _index(position: int, shape: torch.Size) -> tuple[int, ...]:
    """Return the index of a position in row-major order; torch's own function imports all of sympy first."""
    index: list[int] = []
    for size in reversed(shape):
        position, place = divmod(position, size)
        index.append(place)
    return tuple(reversed(index))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a form in which torch can sum them and test them for finiteness."""
    if tensor.is_nested:
        tensor = tensor.values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype is torch.complex32:
        return tensor.to(torch.complex64)
    return tensor.float() if tensor.element_size() == 1 else tensor
