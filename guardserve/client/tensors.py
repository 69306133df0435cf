"""Arrays and tensors as the protocol's binary data, and back.

numpy has no bfloat16: BF16 is taken from torch tensors and from arrays of ml_dtypes, and comes back as float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from reprlib import repr as shown
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The numpy type of each datatype that has one, as its bytes lie on the wire."""

_NAMES = {dtype: name for name, dtype in NUMPY.items()}

_JSON: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}, "O": {str}}
"""What the values of a tensor in JSON are, by the kind of its numpy type."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How guardserve's server sends what JSON has no numbers for."""


def encode(value: object) -> tuple[str, list[int], bytes | memoryview]:
    """Return the datatype, the shape and the bytes of a tensor.

    Args:
        value: A torch tensor on any device, or an array; one of bytes or strings is BYTES.

    Raises:
        TypeError: The protocol has no datatype for it.
    """
    if isinstance(value, torch.Tensor):
        brain = value.dtype is torch.bfloat16
        values: Array = (value.detach().view(torch.int16) if brain else value).numpy(force=True)
    else:
        values = np.asarray(value)
        brain = values.dtype.name == "bfloat16"
        values = values.view(np.int16) if brain else values
    shape = list(values.shape)
    if values.dtype.kind in "OSU":
        return "BYTES", shape, b"".join(map(_element, values.reshape(-1).tolist()))
    wire = values.dtype.newbyteorder("<")
    if wire not in _NAMES:
        raise TypeError(f"{values.dtype} has no datatype in the protocol: give one of {', '.join(map(str, _NAMES))}")
    flat = np.ascontiguousarray(values, wire).reshape(-1)
    return "BF16" if brain else _NAMES[wire], shape, flat.view(np.uint8).data


def decode(data: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """Return a new array of the bytes of a tensor; BYTES become an array of bytes objects.

    Raises:
        ValueError: They are not a tensor of that datatype and shape.
    """
    if datatype == "BYTES":
        found = list(_elements(data))
        if len(found) != math.prod(shape):
            raise ValueError(f"{len(found)} elements are not of shape {list(shape)}")
        values = np.empty(len(found), dtype=object)
        values[:] = found
        return values.reshape(shape)
    if datatype == "BF16":
        halves: Array = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(shape)
    if datatype not in NUMPY:
        raise ValueError(f"the datatype {datatype!r} is not known")
    wire = NUMPY[datatype]
    return np.frombuffer(data, wire).astype(wire.newbyteorder("=")).reshape(shape)


def from_json(data: object, datatype: str, shape: Sequence[int]) -> Array:
    """Return the array of a tensor that came as JSON, flat or nested like its shape.

    Nothing is converted that is none of the datatype: no float is cut to an integer, no bool taken for a number.

    Raises:
        ValueError: It is not one of that datatype and shape.
    """
    if datatype != "BYTES" and datatype not in NUMPY:
        raise ValueError(f"the datatype {datatype!r} has no form in JSON")
    dtype = np.dtype(object) if datatype == "BYTES" else NUMPY[datatype].newbyteorder("=")
    values = _flatten(data, shape)
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} values are not of shape {list(shape)}")
    if dtype.kind == "f" and str in set(map(type, values)):
        values = [_NONFINITE.get(value, value) if type(value) is str else value for value in values]
    if strange := set(map(type, values)) - _JSON[dtype.kind]:
        value = next(value for value in values if type(value) in strange)
        raise ValueError(f"{shown(value)} is no {datatype}")
    if values and dtype.kind in "ui":
        limits: Any = np.iinfo(dtype)
        for value in (min(values), max(values)):
            if not limits.min <= value <= limits.max:
                raise ValueError(f"{value} is beyond {datatype}")
    try:
        with np.errstate(over="raise"):
            return np.array(values, np.float64 if dtype.kind == "f" else dtype).astype(dtype).reshape(shape)
    except (FloatingPointError, OverflowError):
        raise ValueError(f"a value is beyond {datatype}") from None


def _flatten(data: object, shape: Sequence[int]) -> list[Any]:
    """Undo the nesting of data, level by level so that its depth cannot exhaust the stack."""
    if not isinstance(data, list):
        raise ValueError(f"its data are {shown(data)}, no list")  # noqa: TRY004 - of a server, not of a caller
    if len(shape) < 2 or not data or type(data[0]) is not list:  # noqa: PLR2004 - one level is flat already
        return data
    if len(data) != shape[0]:
        raise ValueError(f"{len(data)} lists are not of shape {list(shape)}")
    for size in shape[1:]:
        if not set(map(type, data)) <= {list} or not set(map(len, data)) <= {size}:
            raise ValueError(f"its data are not nested like shape {list(shape)}")
        data = list(chain.from_iterable(data))
    return data


def _element(value: object) -> bytes:
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        raise TypeError(f"an array of objects holds a {type(value).__name__}, but only bytes and strings can be sent")
    return struct.pack("<I", len(value)) + value


def _elements(data: bytes | memoryview) -> Iterator[bytes]:
    rest = memoryview(data)
    while rest:
        if len(rest) < struct.calcsize("<I"):
            raise ValueError("the length of an element is cut off")
        (size,) = struct.unpack_from("<I", rest)
        rest = rest[struct.calcsize("<I") :]
        if size > len(rest):
            raise ValueError("an element is cut off")
        yield bytes(rest[:size])
        rest = rest[size:]
