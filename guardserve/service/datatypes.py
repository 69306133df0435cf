"""Tensor data on the wire: the datatypes of the Open Inference Protocol V2, in JSON and in binary.

A ValueError raised here holds the cause alone; the caller knows which tensor it concerns.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from itertools import chain, compress
from reprlib import repr as shown
from typing import Any, TypeAlias

import numpy as np
import torch

from guardserve.service.array_text import ArrayText
from guardserve.service.limits import Hold, unlimited
from guardserve.signature import DATATYPES

BINARY_ONLY = frozenset({torch.float16, torch.bfloat16})
"""Datatypes that the protocol gives no JSON form."""

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_NONFINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}

# The numpy type with the same bytes. numpy has no bfloat16, and bytes off the wire are not yet known to be booleans.
_STORAGE: dict[torch.dtype, np.dtype[Any]] = {
    torch.bool: np.dtype("u1"),
    torch.uint8: np.dtype("u1"),
    torch.uint16: np.dtype("u2"),
    torch.uint32: np.dtype("u4"),
    torch.uint64: np.dtype("u8"),
    torch.int8: np.dtype("i1"),
    torch.int16: np.dtype("i2"),
    torch.int32: np.dtype("i4"),
    torch.int64: np.dtype("i8"),
    torch.float16: np.dtype("f2"),
    torch.float32: np.dtype("f4"),
    torch.float64: np.dtype("f8"),
    torch.bfloat16: np.dtype("i2"),
}


def datatype_name(dtype: torch.dtype) -> str:
    """Return the protocol's name of a dtype.

    Raises:
        ValueError: The protocol has no datatype for it.
    """
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} has no Open Inference Protocol datatype; one of {', '.join(DATATYPES)} is needed")
    return _NAMES[dtype]


def decode_binary(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Copy little-endian, row-major bytes at any alignment into a new tensor.

    Args:
        data: Exactly as many bytes as the tensor holds.
        dtype: Element type of the tensor.
        shape: Sizes of the tensor.

    Raises:
        ValueError: A byte of a BOOL is neither 0 nor 1.
    """
    if sys.byteorder == "little" and data and dtype is not torch.bool:
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    storage = _STORAGE[dtype]
    values = np.frombuffer(data, storage.newbyteorder("<")).astype(storage)
    if dtype is torch.bool and (bad := values > 1).any():
        index = int(bad.argmax())
        raise ValueError(f"the byte at index {index} is {values[index]}, and a BOOL is 0 or 1")
    tensor = torch.from_numpy(values.reshape(shape))
    return tensor if tensor.dtype is dtype else tensor.view(dtype)


def encode_binary(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's values as little-endian, row-major bytes."""
    values = _flat(tensor)
    if sys.byteorder == "big":
        values = values.astype(values.dtype.newbyteorder("<"))
    return values.view(np.uint8).data


def decode_json(data: object, dtype: torch.dtype, shape: Sequence[int], hold: Hold = unlimited) -> torch.Tensor:
    """Convert the data of a parsed JSON tensor, nested like ``shape`` or flat in row-major order.

    Every value must be one of the datatype: a float is no integer, a bool no number, and an integer must be in range.
    Only the floating datatypes round, to their nearest value, and only what was infinite becomes infinite.

    Args:
        data: The parsed list, or its text if that is long.
        dtype: Element type of the tensor.
        shape: Sizes of the tensor.
        hold: Told of the tensor's bytes before it is made.

    Raises:
        ValueError: The datatype has no JSON form, or the data does not fit it or the shape.
    """
    if dtype in BINARY_ONLY:
        raise ValueError(f"{datatype_name(dtype)} has no JSON form: send it as binary data, with binary_data_size")
    if isinstance(data, ArrayText):
        return torch.from_numpy(_read(data, dtype, shape, hold).reshape(shape))
    if not isinstance(data, list):
        raise ValueError(f"data is {shown(data)}, not a list")  # noqa: TRY004 - one class for all that a client may send
    values = _flatten(data, shape)
    _check_count(len(values), shape)
    hold(len(values) * dtype.itemsize)
    return torch.from_numpy(_to_array(values, dtype).reshape(shape))


def encode_json(tensor: torch.Tensor) -> Array:
    """Return a tensor's values, flat in row-major order, as an array that orjson can write.

    Raises:
        ValueError: A value is NaN or infinite, which JSON cannot express.
    """
    values = _flat(tensor)
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite, which JSON cannot express")
    return values


def encode_json_strings(tensor: torch.Tensor) -> list[float | str]:
    """Return a tensor's values, flat in row-major order, with "NaN", "Infinity" and "-Infinity" for what JSON lacks."""
    return [value if math.isfinite(value) else _NONFINITE[str(value)] for value in _flat(tensor).tolist()]


def _flat(tensor: torch.Tensor) -> Array:
    """Return the values of a tensor in row-major order, bfloat16 as the int16 of the same bits."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    values: Array = tensor.numpy(force=True).reshape(-1)
    return values


def _read(text: ArrayText, dtype: torch.dtype, shape: Sequence[int], hold: Hold) -> Array:
    """Read a long array without ever having all of its values as objects."""
    count, found = math.prod(shape), 0
    if 2 * count > len(text) or not count:  # a value and what is behind it take two bytes at least
        raise ValueError(f"data of {len(text)} bytes does not hold the {count} values that shape {list(shape)} takes")
    hold(count * dtype.itemsize)
    pure = not text.has_booleans
    array: Array = np.empty(count, np.bool_ if dtype is torch.bool else _STORAGE[dtype])
    for values in text.lists(shape):
        hold(0)
        if found + len(values) > count:  # what follows is not worth the time
            raise ValueError(f"data holds more than the {count} values that shape {list(shape)} takes")
        array[found : found + len(values)] = _to_array(values, dtype, found, pure=pure)
        found += len(values)
    _check_count(found, shape)
    return array


def _check_count(found: int, shape: Sequence[int]) -> None:
    if found != math.prod(shape):
        raise ValueError(f"data holds {found} values, but shape {list(shape)} takes {math.prod(shape)}")


def _flatten(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Undo the nesting of ``data``, level by level so that its depth cannot exhaust the stack."""
    if len(shape) < 2 or not data or type(data[0]) is not list:  # noqa: PLR2004 - one level is flat already
        return data
    if len(data) != shape[0]:
        raise ValueError(f"data is {len(data)} lists, but shape {list(shape)} takes {shape[0]}")
    for axis, size in enumerate(shape[1:], start=1):
        if not set(map(type, data)) <= {list} or not set(map(len, data)) <= {size}:
            raise ValueError(f"nested data is not made of lists of {size} at axis {axis} of shape {list(shape)}")
        data = list(chain.from_iterable(data))
    return data


def _to_array(values: list[Any], dtype: torch.dtype, before: int = 0, *, pure: bool = False) -> Array:
    """Convert a flat list strictly.

    ``array.array`` is as fast as numpy and refuses what numpy would convert: strings, null, floats for integers,
    integers out of range. It takes a bool for a number, but a bool can only have become 0 or 1.

    Args:
        values: The list.
        dtype: What its values are to be.
        before: Values of the same tensor before them.
        pure: Whether it is known that none is a bool.

    Raises:
        ValueError: A value is none.
    """
    if dtype is torch.bool:
        if not set(map(type, values)) <= {bool}:
            raise _misfit(values, dtype, before)
        return np.array(values, dtype=np.bool_)
    storage = np.dtype("f8") if dtype.is_floating_point else _STORAGE[dtype]
    try:
        numbers = np.frombuffer(array(storage.char, values), storage)
    except (TypeError, OverflowError):
        raise _misfit(values, dtype, before) from None
    suspects = np.zeros(0, np.bool_) if pure else (numbers == 0) | (numbers == 1)
    if suspects.any() and bool in set(map(type, compress(values, suspects.tobytes()))):
        raise _misfit(values, dtype, before)
    return _narrow(numbers, before) if dtype is torch.float32 else numbers


def _narrow(numbers: Array, before: int) -> Array:
    """Round float64 to float32, refusing what overflows."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities of both signs have no sum
        narrow = numbers.astype(np.float32)
        if math.isfinite(narrow.sum()):
            return narrow
    overflowed = np.isinf(narrow) & np.isfinite(numbers)
    if overflowed.any():
        index = int(overflowed.argmax())
        raise ValueError(f"the value at index {before + index} is {numbers[index]}, which overflows FP32")
    return narrow


def _misfit(values: list[Any], dtype: torch.dtype, before: int) -> ValueError:
    """Describe the first value that is not one of the datatype."""
    index = next(index for index, value in enumerate(values) if not _fits(value, dtype))
    if dtype is torch.bool:
        expected = "true or false"
    elif dtype.is_floating_point:
        expected = "a number"
    else:
        limits = np.iinfo(_STORAGE[dtype])
        expected = f"an integer from {limits.min} to {limits.max}"
    where = f"the value at index {before + index}"
    return ValueError(f"{where} is {shown(values[index])}, and {_NAMES[dtype]} takes {expected}")


def _fits(value: object, dtype: torch.dtype) -> bool:
    """Tell whether a value from JSON is one of the datatype."""
    if dtype is torch.bool:
        return type(value) is bool
    if dtype.is_floating_point:
        return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
    limits = np.iinfo(_STORAGE[dtype])
    return type(value) is int and int(limits.min) <= value <= int(limits.max)
