"""The client's tensors on the wire, against tritonclient's own functions and the server's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import serialize_byte_tensor

from guardserve.client.tensors import NUMPY, decode, encode, from_json
from guardserve.service.datatypes import decode_binary, encode_binary
from guardserve.signature import DATATYPES


@given(st.data(), st.sampled_from(sorted(NUMPY)))
def test_every_datatype_with_a_numpy_type_comes_back_as_it_was(data: st.DataObject, datatype: str) -> None:
    """And the server reads the same values from the bytes."""
    array = data.draw(arrays.arrays(NUMPY[datatype], arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)))
    name, shape, content = encode(array)
    assert (name, shape) == (datatype, list(array.shape))
    back = decode(content, name, shape)
    np.testing.assert_array_equal(back, array)
    assert back.flags.writeable
    served = decode_binary(memoryview(bytes(content)), DATATYPES[datatype], tuple(shape))
    np.testing.assert_array_equal(served.numpy(), array)


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_tensors_are_what_the_server_makes_of_them(datatype: str) -> None:
    """Every datatype of torch's, also of a tensor that is not contiguous and wants gradients."""
    tensor = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(DATATYPES[datatype])
    if tensor.is_floating_point():
        tensor = (tensor + 0.375).requires_grad_()
    name, shape, content = encode(tensor.T)
    assert (name, shape) == (datatype, [2, 3])
    assert bytes(content) == bytes(encode_binary(tensor.detach().T))
    back = torch.from_numpy(decode(content, name, shape))
    assert torch.equal(back.to(tensor.dtype), tensor.detach().T)


def test_arrays_of_the_other_byte_order_and_of_strides_are_sent_right() -> None:
    """The wire is little-endian and row-major whatever the array is."""
    array = np.arange(12, dtype=">i4").reshape(3, 4)[::2, ::-1]
    name, shape, content = encode(array)
    assert name == "INT32"
    np.testing.assert_array_equal(decode(content, name, shape), array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([["a", "é"], ["", "🙂"]]),
        np.array([[b"a", b"\x00\xff"], [b"", b"long" * 100]], dtype=object),
        np.array([b"one", b"two"]),
    ],
)
def test_bytes_are_sent_as_triton_sends_them(array: Any) -> None:
    """Strings are UTF-8; bytes come back as objects."""
    name, shape, content = encode(array)
    assert (name, shape) == ("BYTES", list(array.shape))
    assert bytes(content) == serialize_byte_tensor(array.astype(object)).item()
    back = decode(content, name, shape)
    want = [value.encode() if isinstance(value, str) else value for value in array.reshape(-1).tolist()]
    assert back.shape == array.shape
    assert back.reshape(-1).tolist() == want


@pytest.mark.parametrize("value", [np.zeros(2, dtype=complex), np.array([1, None]), torch.zeros(2, dtype=torch.cfloat)])
def test_what_has_no_datatype_is_refused(value: object) -> None:
    """Before anything is sent."""
    with pytest.raises(TypeError, match=r"datatype|only bytes"):
        encode(value)


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        (b"\0" * 7, "FP32", [2]),
        (b"\0" * 8, "FP32", [3]),
        (b"\0" * 4, "FP128", [1]),
        (b"\1\0", "BYTES", [1]),
        (b"\5\0\0\0ab", "BYTES", [1]),
        (b"\1\0\0\0a", "BYTES", [2]),
    ],
)
def test_bytes_that_are_no_tensor_are_refused(data: bytes, datatype: str, shape: list[int]) -> None:
    """Too few, too many, cut off, or of an unknown datatype."""
    with pytest.raises(ValueError, match=r"."):
        decode(data, datatype, shape)


def test_json_is_read_where_a_server_sends_it() -> None:
    """Flat or nested; half floats have no such form."""
    np.testing.assert_array_equal(from_json([1, 2, 3, 4], "INT16", [2, 2]), np.array([[1, 2], [3, 4]], np.int16))
    assert from_json([[0.5], [1]], "FP32", [2, 1]).dtype == np.float32
    assert from_json(["a", "b"], "BYTES", [2]).tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="BF16"):
        from_json([1.0], "BF16", [1])


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "reason"),
    [
        ([1.7], "INT32", [1], r"1\.7 is no INT32"),
        ([True], "INT32", [1], "True is no INT32"),
        ([1, "false"], "BOOL", [2], "is no BOOL"),
        ([None, 1], "FP32", [2], "None is no FP32"),
        (["nan"], "FP32", [1], "'nan' is no FP32"),
        ([True], "FP64", [1], "True is no FP64"),
        ([1], "BYTES", [1], "1 is no BYTES"),
        ([300], "UINT8", [1], "300 is beyond UINT8"),
        ([5, -1], "UINT64", [2], "-1 is beyond UINT64"),
        ([2**64], "INT64", [1], "is beyond INT64"),
        ([1e300], "FP32", [1], "beyond FP32"),
        ([10**400], "FP64", [1], "beyond FP64"),
        ([1, 2, 3], "FP32", [2], "3 values are not of shape"),
        ([[1], [2, 3]], "FP32", [2, 2], "not nested like shape"),
        ([[1, 2]], "FP32", [2, 1], "1 lists are not of shape"),
        (1, "FP32", [1], "1, no list"),
        ({"a": 1}, "FP32", [1], "no list"),
    ],
)
def test_json_that_is_none_of_its_datatype_is_refused(
    data: object, datatype: str, shape: list[int], reason: str
) -> None:
    """Nothing is cut, wrapped around, or taken for something else."""
    with pytest.raises(ValueError, match=reason):
        from_json(data, datatype, shape)


@pytest.mark.parametrize("datatype", [name for name, dtype in NUMPY.items() if dtype.kind in "ui"])
def test_json_gives_the_whole_range_of_an_integer_exactly(datatype: str) -> None:
    """Also where a float would round."""
    limits = np.iinfo(NUMPY[datatype])
    extremes = [int(limits.min), int(limits.max)]
    assert from_json(extremes, datatype, [2]).tolist() == extremes


def test_json_gives_what_is_not_finite_as_guardserve_sends_it() -> None:
    """JSON has no number for it."""
    values = from_json(["NaN", "Infinity", "-Infinity", 1], "FP32", [4])
    np.testing.assert_array_equal(values, np.array([np.nan, np.inf, -np.inf, 1], np.float32))
