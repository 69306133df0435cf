"""Reading what a model returns: arrays and numbers as tensors, and what is none of these by its type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
_DEEPEST = 8


def read_output(output: Any) -> tuple[Any, tuple[str, ...]]:
    """Turn numpy arrays, numbers and lists of numbers into tensors, and objects into what they hold.

    Returns:
        The output in dicts, lists and tensors, and what could not be read of it: ``output['names'] is a str``.
    """
    unread: dict[str, str] = {}
    read = _read(output, "output", unread, 0)
    return read, tuple(f"{path} is {kind}" for path, kind in unread.items())


def _read(value: Any, path: str, unread: dict[str, str], depth: int) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (*_NUMBERS, np.ndarray)):
        return _tensor(value, path, unread)
    if depth < _DEEPEST and isinstance(value, (list, tuple)):
        if _is_numbers(value) and (numbers := _tensor(value, path, {})) is not None:
            return numbers
        return [_read(item, f"{path}[{index}]", unread, depth + 1) for index, item in enumerate(value)]
    held = _held(value)
    if depth < _DEEPEST and held is not None:
        return {key: _read(item, f"{path}[{key!r}]", unread, depth + 1) for key, item in held.items()}
    unread[path] = f"a {type(value).__name__}"
    return None


def _tensor(value: Any, path: str, unread: dict[str, str]) -> torch.Tensor | None:
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, OverflowError):
        unread[path] = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        return None


def _is_numbers(values: Any) -> bool:
    """Tell whether a list holds numbers, or lists of as many numbers each, and nothing else."""
    if all(isinstance(value, _NUMBERS) for value in values):
        return bool(values)
    return (
        all(isinstance(value, (list, tuple)) and _is_numbers(value) for value in values)
        and len({len(value) for value in values}) == 1
    )


def _held(value: Any) -> Mapping[Any, Any] | None:
    """Return what a mapping, a dataclass or another object holds by name; None when it is opaque."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (str, bytes, type)) or callable(value):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return getattr(value, "__dict__", None) or None
