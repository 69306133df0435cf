"""Tensor data in JSON and in binary."""

from __future__ import annotations

import math
import struct
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardserve.service.datatypes import (
    BINARY_ONLY,
    datatype_name,
    decode_binary,
    decode_json,
    encode_binary,
    encode_json,
)
from guardserve.signature import DATATYPES

INTEGERS = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
}
JSON_DATATYPES = sorted(name for name, dtype in DATATYPES.items() if dtype not in BINARY_ONLY)

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor, which tell NaN payloads and signed zeros apart."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy().tobytes()


def nested(values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Nest a flat list like a shape."""
    if len(shape) == 1:
        return values
    step = math.prod(shape[1:])
    return [nested(values[row * step : (row + 1) * step], shape[1:]) for row in range(shape[0])]


def refusal(data: object, datatype: str, shape: tuple[int, ...]) -> str:
    """Return the message with which JSON data is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the caller checks
        decode_json(data, DATATYPES[datatype], shape)
    return str(caught.value)


@given(st.data(), st.sampled_from(sorted(DATATYPES)), shapes, st.integers(0, 7))
def test_binary_data_keeps_every_bit(data: st.DataObject, datatype: str, shape: tuple[int, ...], offset: int) -> None:
    """Any bytes, NaN payloads included and at any alignment, come back as they were sent."""
    dtype = DATATYPES[datatype]
    size = math.prod(shape) * dtype.itemsize
    element = st.integers(0, 1 if dtype is torch.bool else 255)
    payload = bytes(data.draw(st.lists(element, min_size=size, max_size=size)))
    tensor = decode_binary(memoryview(bytes(offset) + payload)[offset:], dtype, shape)
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    assert bits(tensor) == payload
    assert encode_binary(tensor).tobytes() == payload


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_binary_data_is_little_endian(datatype: str) -> None:
    """The value one has its known bytes, least significant first."""
    known = {"FP16": b"\0\x3c", "BF16": b"\x80\x3f", "FP32": b"\0\0\x80\x3f", "FP64": b"\0\0\0\0\0\0\xf0\x3f"}
    dtype = DATATYPES[datatype]
    one = known.get(datatype, b"\1".ljust(dtype.itemsize, b"\0"))
    assert torch.equal(decode_binary(memoryview(one), dtype, (1,)), torch.ones(1, dtype=dtype))
    assert encode_binary(torch.ones(1, dtype=dtype)).tobytes() == one


def test_decoded_tensors_own_their_memory() -> None:
    """Writing to a tensor changes neither the body nor a tensor decoded from it later."""
    body = bytes(12)
    first = decode_binary(memoryview(body), torch.float32, (3,))
    first.fill_(7)
    assert body == bytes(12)
    assert decode_binary(memoryview(body), torch.float32, (3,)).sum() == 0
    decode_json([1, 2], torch.int64, (2,)).add_(1)


def test_a_binary_bool_is_zero_or_one() -> None:
    """Any other byte would be a bool that equals neither True nor False."""
    with pytest.raises(ValueError, match="the byte at index 1 is 2, and a BOOL is 0 or 1"):
        decode_binary(memoryview(b"\1\2\xff"), torch.bool, (3,))


@given(st.data(), st.sampled_from(JSON_DATATYPES), shapes)
def test_json_data_round_trips_flat_and_nested(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    """Every finite value of every datatype survives JSON to the bit, in both forms of the data."""
    dtype = DATATYPES[datatype]
    numpy_dtype = torch.zeros(0, dtype=dtype).numpy().dtype
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.is_floating_point else {}
    tensor = torch.from_numpy(data.draw(hnp.arrays(numpy_dtype, shape, elements=elements)))
    flat = orjson.loads(orjson.dumps(encode_json(tensor), option=orjson.OPT_SERIALIZE_NUMPY))
    for form in (flat, nested(flat, shape)):
        decoded = decode_json(form, dtype, shape)
        assert (decoded.dtype, decoded.shape) == (dtype, tensor.shape)
        assert decoded.is_contiguous()
        assert bits(decoded) == bits(tensor)


@given(st.sampled_from(sorted(INTEGERS)), st.lists(st.integers(-(2**65), 2**65) | st.integers(-300, 300), max_size=6))
def test_integers_are_exact_or_refused(datatype: str, values: list[int]) -> None:
    """What struct can pack is read as it packs it, and what it cannot is refused."""
    try:
        packed = struct.pack(f"<{len(values)}{INTEGERS[datatype]}", *values)
    except struct.error:
        assert f"{datatype} takes an integer from " in refusal(values, datatype, (len(values),))
    else:
        assert bits(decode_json(values, DATATYPES[datatype], (len(values),))) == packed


@given(
    st.lists(
        st.floats()
        | st.floats(width=32)
        | st.integers(-(2**70), 2**70)
        | st.sampled_from([3.4028235677973366e38, 3.4028235e38, -1e39, 0, 1, 0.0, 1.0, -0.0, 10**38, 10**39]),
        max_size=6,
    )
)
def test_fp32_is_the_nearest_value_or_refused_when_it_overflows(values: list[float]) -> None:
    """What struct can pack is read as it packs it; only what was infinite becomes infinite."""
    try:
        packed = struct.pack(f"<{len(values)}f", *values)
    except (OverflowError, struct.error):
        assert "overflows FP32" in refusal(values, "FP32", (len(values),))
    else:
        assert np.array_equal(
            decode_json(values, torch.float32, (len(values),)).numpy(), np.frombuffer(packed, "<f4"), equal_nan=True
        )


json_scalars = st.booleans() | st.integers(0, 2) | st.floats(-2, 2) | st.none() | st.text(max_size=2)
json_values = st.lists(json_scalars | st.lists(json_scalars, max_size=2) | st.just({"a": 1}), max_size=6)


@given(st.sampled_from(JSON_DATATYPES), json_values | st.lists(st.sampled_from([0, 1, True, False]), max_size=40))
def test_only_values_of_the_datatype_are_accepted(datatype: str, values: list[Any]) -> None:
    """A bool is no number, a float no integer, and nothing else is either; the message has the first misfit."""
    numbers: tuple[type, ...] = (int, float) if datatype.startswith("FP") else (int,)
    allowed = (bool,) if datatype == "BOOL" else numbers
    misfits = [index for index, value in enumerate(values) if type(value) not in allowed]
    if misfits:
        message = refusal(values, datatype, (len(values),))
        assert message.startswith(f"the value at index {misfits[0]} is ")
        assert f"and {datatype} takes " in message
    else:
        decode_json(values, DATATYPES[datatype], (len(values),))


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "message"),
    [
        (None, "FP32", (1,), "data is None, not a list"),
        ({"0": 1}, "FP32", (1,), "data is {'0': 1}, not a list"),
        ([1, 2, 3], "FP32", (2, 2), "data holds 3 values, but shape [2, 2] takes 4"),
        ([1, 2, 3], "FP32", (2,), "data holds 3 values, but shape [2] takes 2"),
        ([], "FP32", (1, 2), "data holds 0 values, but shape [1, 2] takes 2"),
        ([[1, 2]], "FP32", (2, 2), "data is 1 lists, but shape [2, 2] takes 2"),
        ([[1, 2], [3]], "FP32", (2, 2), "nested data is not made of lists of 2 at axis 1 of shape [2, 2]"),
        ([[1, 2], 3, 4], "FP32", (3, 2), "nested data is not made of lists of 2 at axis 1 of shape [3, 2]"),
        ([[1, 2, 3, 4]], "FP32", (1, 2, 2), "nested data is not made of lists of 2 at axis 1 of shape [1, 2, 2]"),
        ([[1], [2]], "FP32", (2,), "the value at index 0 is [1], and FP32 takes a number"),
        ([[[1]], [[2]]], "FP32", (2, 1), "the value at index 0 is [1], and FP32 takes a number"),
        ([1, [2]], "FP32", (1, 2), "the value at index 1 is [2], and FP32 takes a number"),
        ([0.5, "1"], "FP32", (2,), "the value at index 1 is '1', and FP32 takes a number"),
        ([0.5, None], "FP64", (2,), "the value at index 1 is None, and FP64 takes a number"),
        ([1.0, True], "FP32", (2,), "the value at index 1 is True, and FP32 takes a number"),
        ([10**400], "FP64", (1,), "is 100000000000000000...0000000000000000000, and FP64 takes a number"),
        ([0, 1e39], "FP32", (2,), "the value at index 1 is 1e+39, which overflows FP32"),
        ([0, 1], "BOOL", (2,), "the value at index 0 is 0, and BOOL takes true or false"),
        ([1, 2.0], "INT64", (2,), "the value at index 1 is 2.0, and INT64 takes an integer from -922"),
        ([1, False], "INT8", (2,), "the value at index 1 is False, and INT8 takes an integer from -128 to 127"),
        ([256], "UINT8", (1,), "the value at index 0 is 256, and UINT8 takes an integer from 0 to 255"),
        (
            [-1],
            "UINT64",
            (1,),
            "the value at index 0 is -1, and UINT64 takes an integer from 0 to 18446744073709551615",
        ),
        ([float("nan")], "INT32", (1,), "the value at index 0 is nan, and INT32 takes an integer"),
        ([1.0], "FP16", (1,), "FP16 has no JSON form: send it as binary data, with binary_data_size"),
        ([1.0], "BF16", (1,), "BF16 has no JSON form: send it as binary data, with binary_data_size"),
    ],
)
def test_json_data_that_does_not_fit_is_refused(
    data: object, datatype: str, shape: tuple[int, ...], message: str
) -> None:
    """The message has what was seen, where, and what is expected."""
    assert message in refusal(data, datatype, shape)


def test_non_finite_numbers_pass_as_floats() -> None:
    """Whether a model accepts them is not for the codec to say."""
    values = [float("nan"), float("inf"), float("-inf")]
    assert repr(decode_json(values, torch.float32, (3,)).tolist()) == "[nan, inf, -inf]"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_values_are_not_written_as_json(value: float, dtype: torch.dtype) -> None:
    """JSON of null instead would hide the fault from the client."""
    with pytest.raises(ValueError, match="a value is NaN or infinite, which JSON cannot express"):
        encode_json(torch.tensor([[0.0, value]], dtype=dtype))


def test_any_layout_is_written_in_row_major_order() -> None:
    """A transposed tensor that requires grad is written like its contiguous copy."""
    tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    assert encode_json(tensor).tolist() == [0, 3, 1, 4, 2, 5]
    assert np.frombuffer(encode_binary(tensor), "<f4").tolist() == [0, 3, 1, 4, 2, 5]


def test_names_and_dtypes_correspond() -> None:
    """Each datatype has a dtype of its own, and a dtype outside the protocol is an error."""
    assert {datatype_name(dtype): dtype for dtype in DATATYPES.values()} == dict(DATATYPES)
    with pytest.raises(ValueError, match=r"torch\.complex64 has no Open Inference Protocol datatype; one of BOOL, "):
        datatype_name(torch.complex64)
