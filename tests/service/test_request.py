"""Inference requests: what is read, and what each malformed one is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
import torch

from guardserve.service.body import ProtocolError
from guardserve.service.request import InferRequest, RequestedOutput, parse_request
from guardserve.signature import Signature, TensorSpec

ONE = Signature((TensorSpec("x", torch.float32, (-1, 3)),), (TensorSpec("y", torch.float32, (-1, 2)),))
TWO = Signature(
    (TensorSpec("image", torch.float32, (-1, 2, -1)), TensorSpec("mask", torch.bool, (-1,))),
    (TensorSpec("logits", torch.float32, (-1, 5)), TensorSpec("label", torch.int64, (-1,))),
)
X: dict[str, Any] = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}
IMAGE: dict[str, Any] = {"name": "image", "shape": [2, 2, 1], "datatype": "FP32", "data": [1, 2, 3, 4]}
HINT = "whose length belongs in the header Inference-Header-Content-Length"
MASK: dict[str, Any] = {"name": "mask", "shape": [2], "datatype": "BOOL", "data": [True, False]}


def without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an entry less one of its members."""
    return {name: value for name, value in entry.items() if name != key}


def parse(request: object, tail: bytes | None = None, signature: Signature = ONE) -> InferRequest:
    """Parse a request given as what its JSON says, and the binary tensors behind it if there are any."""
    body = orjson.dumps(request)
    header = None if tail is None else str(len(body))
    return parse_request(body + (tail or b""), header, signature, max_batch_size=4)


def refusal(request: object, tail: bytes | None = None, signature: Signature = ONE) -> ProtocolError:
    """Return the error with which a request is refused."""
    with pytest.raises(ProtocolError) as caught:
        parse(request, tail, signature)
    assert caught.value.status == 400
    return caught.value


def test_a_minimal_request_is_read() -> None:
    """One input is enough: everything else has its default."""
    request = parse({"inputs": [X]})
    assert (request.id, request.parameters, request.outputs, request.binary_output) == (None, {}, None, False)
    assert list(request.inputs) == ["x"]
    assert torch.equal(request.inputs["x"], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))


def test_a_full_request_is_read() -> None:
    """Identifier, parameters, inputs in any order and the output filter arrive as they were sent."""
    outputs = [{"name": "label"}, {"name": "logits", "parameters": {"binary_data": False, "other": [1]}}]
    parameters = {"binary_data_output": True, "priority": 3}
    request = parse({"id": "7", "parameters": parameters, "inputs": [MASK, IMAGE], "outputs": outputs}, signature=TWO)
    assert (request.id, request.parameters, request.binary_output) == ("7", parameters, True)
    assert request.outputs == (RequestedOutput("label"), RequestedOutput("logits", binary=False))
    assert list(request.inputs) == ["image", "mask"]
    assert request.inputs["mask"].tolist() == [True, False]


def test_null_stands_for_an_absent_optional_member() -> None:
    """Clients built on pydantic models write null for what was not set."""
    entry = {**X, "parameters": None}
    request = parse({"id": None, "parameters": None, "inputs": [entry], "outputs": None})
    assert (request.id, request.parameters, request.outputs) == (None, {}, None)
    nulls = {"binary_data_output": None, "classification": None, "binary_data": None, "binary_data_size": None}
    entry = {**X, "parameters": nulls}
    request = parse({"parameters": nulls, "inputs": [entry], "outputs": [{"name": "y", "parameters": nulls}]})
    assert request.outputs == (RequestedOutput("y"),)


def test_an_empty_output_filter_asks_for_all() -> None:
    """No output at all would be a strange thing to ask for."""
    assert parse({"inputs": [X], "outputs": []}).outputs is None


def test_binary_and_json_inputs_mix() -> None:
    """Binary tensors follow the JSON in the order of the request, at any alignment."""
    mask = {**without(MASK, "data"), "parameters": {"binary_data_size": 2}}
    image = {**without(IMAGE, "data"), "parameters": {"binary_data_size": 16}}
    values = np.array([1, 2, 3, np.nan], "<f4").tobytes()
    for inputs, tail in [([mask, image], b"\1\0" + values), ([image, MASK], values), ([IMAGE, mask], b"\1\0")]:
        request = parse({"inputs": inputs}, tail, TWO)
        assert request.inputs["mask"].tolist() == [True, False]
        assert request.inputs["image"].flatten().tolist()[:3] == [1, 2, 3]


def test_a_raw_body_is_one_sample() -> None:
    """Header 0 means that there is no JSON: the body is the only input, and outputs are binary."""
    body = np.array([1, 2, 3], "<f4").tobytes()
    request = parse_request(body, "0", ONE, max_batch_size=1)
    assert torch.equal(request.inputs["x"], torch.tensor([[1.0, 2, 3]]))
    assert (request.id, request.outputs, request.binary_output) == (None, None, True)


def test_the_free_size_of_a_raw_body_follows_from_its_length() -> None:
    """As long as only one size is free."""
    signature = Signature((TensorSpec("x", torch.int16, (1, 2, -1)),))
    assert parse_request(bytes(12), "0", signature, max_batch_size=None).inputs["x"].shape == (1, 2, 3)
    assert parse_request(b"", "0", signature, max_batch_size=None).inputs["x"].shape == (1, 2, 0)


@pytest.mark.parametrize(
    ("body", "shape", "message"),
    [
        (bytes(11), (-1, 3), "input 'x': a raw body of 11 bytes is not one sample of shape [-1, 3] of FP32"),
        (bytes(24), (-1, 3), "input 'x': a raw body of 24 bytes is not one sample of shape [-1, 3] of FP32"),
        (b"", (-1, 3), "input 'x': a raw body of 0 bytes is not one sample of shape [-1, 3] of FP32"),
        (bytes(12), (2, 3), "input 'x': a raw body of 12 bytes is not one sample of shape [2, 3] of FP32"),
        (bytes(4), (-1, -1, -1), "input 'x': a raw body of 4 bytes is not one sample of shape [-1, -1, -1] of FP32"),
        (bytes(9), (-1, 2, -1), "input 'x': a raw body of 9 bytes is not one sample of shape [-1, 2, -1] of FP32"),
        (bytes(4), (-1, 0, -1), "input 'x': a raw body of 4 bytes is not one sample of shape [-1, 0, -1] of FP32"),
    ],
)
def test_a_raw_body_that_is_not_one_sample_is_refused(body: bytes, shape: tuple[int, ...], message: str) -> None:
    """Its length must give exactly one sample."""
    signature = Signature((TensorSpec("x", torch.float32, shape),))
    with pytest.raises(ProtocolError) as caught:
        parse_request(body, "0", signature, max_batch_size=4)
    assert (str(caught.value), caught.value.status, caught.value.reason) == (message, 400, "invalid_input")


def test_a_raw_body_needs_a_model_of_one_input() -> None:
    """Which tensor would it be?"""
    with pytest.raises(ProtocolError, match="is 0, which is for models of one input; this one takes 'image', 'mask'"):
        parse_request(bytes(4), "0", TWO, max_batch_size=4)


def test_an_empty_body_is_no_raw_one() -> None:
    """Without a header it ought to be JSON, whatever the model takes."""
    signature = Signature((TensorSpec("x", torch.float32, (-1, -1)),))
    with pytest.raises(ProtocolError, match="the request is not valid JSON"):
        parse_request(b"", None, signature, max_batch_size=4)


def test_a_raw_bool_is_checked() -> None:
    """The bytes of a BOOL are 0 or 1 there too."""
    with pytest.raises(ProtocolError, match="input 'x': the byte at index 0 is 3"):
        parse_request(b"\3", "0", Signature((TensorSpec("x", torch.bool, (-1, 1)),)), max_batch_size=4)


def test_outputs_are_not_checked_without_declared_ones() -> None:
    """A signature may leave the outputs open; the response then knows them."""
    request = parse({"inputs": [X], "outputs": [{"name": "any"}]}, signature=Signature(ONE.inputs))
    assert request.outputs == (RequestedOutput("any"),)


def test_any_batch_size_passes_without_a_maximum() -> None:
    """None means no limit."""
    body = orjson.dumps({"inputs": [{**X, "shape": [100, 3], "data": [0] * 300}]})
    assert len(parse_request(body, None, ONE, max_batch_size=None).inputs["x"]) == 100


def test_a_free_size_may_be_zero_but_not_the_batch() -> None:
    """An empty sample is the model's business; an empty batch is refused."""
    empty = {**IMAGE, "shape": [2, 2, 0], "data": []}
    assert parse({"inputs": [empty, MASK]}, signature=TWO).inputs["image"].shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "the request must be a JSON object, not []"),
        ("text", "the request must be a JSON object, not 'text'"),
        ({"id": 7, "inputs": [X]}, "id of the request must be a JSON string, not 7"),
        ({"parameters": [], "inputs": [X]}, "parameters of the request must be a JSON object, not []"),
        (
            {"parameters": {"binary_data_output": 1}, "inputs": [X]},
            "binary_data_output of the request's parameters must be a JSON boolean, not 1",
        ),
        ({"inputs": {"x": 1}}, "inputs of the request must be a JSON array, not {'x': 1}"),
        ({"inputs": ["x"]}, "an entry of inputs must be a JSON object, not 'x'"),
        ({"inputs": [{**X, "parameters": 3}]}, "parameters of input 'x' must be a JSON object, not 3"),
        ({"inputs": [X], "outputs": "y"}, "outputs of the request must be a JSON array, not 'y'"),
        ({"inputs": [X], "outputs": ["y"]}, "an entry of outputs must be a JSON object, not 'y'"),
        ({"inputs": [X], "outputs": [{"name": "y"}, {"name": "y"}]}, "output 'y' is requested twice"),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": True}]},
            "parameters of output 'y' must be a JSON object, not True",
        ),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
            "binary_data of the parameters of output 'y' must be a JSON boolean, not 'yes'",
        ),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
            "'classification' of output 'y' is not supported by this server",
        ),
        (
            {"inputs": [X], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "'shared_memory_region' of output 'y' is not supported by this server",
        ),
        (
            {"inputs": [{**without(X, "data"), "parameters": {"shared_memory_byte_size": 24}}]},
            "'shared_memory_byte_size' of input 'x' is not supported by this server",
        ),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(request_: object, message: str) -> None:
    """Every member that the server reads has its type, and extensions that it lacks are named."""
    error = refusal(request_)
    assert (str(error), error.reason) == (message, "malformed")


@pytest.mark.parametrize("name", ["z", 3, None, ["y"], "x" * 1000, "\u2028"])
def test_an_unknown_output_is_refused(name: object) -> None:
    """The message names what the model gives, and stays short whatever was asked for."""
    error = refusal({"inputs": [X], "outputs": [{"name": name}]})
    assert error.reason == "unknown_output"
    assert str(error).startswith("unknown output ")
    assert str(error).endswith(": the model gives 'y'")
    assert len(str(error)) < 100


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "missing input 'x': the model takes 'x'"),
        ([], "missing input 'x': the model takes 'x'"),
        ([X, X], "input 'x' is given twice"),
        ([X, {**X, "name": "z"}], "unknown input 'z': the model takes 'x'"),
        ([{**X, "name": "\u2028"}], "unknown input '\\u2028': the model takes 'x'"),
        ([without(X, "name")], "unknown input None: the model takes 'x'"),
        ([{**X, "name": ["x"]}], "unknown input ['x']: the model takes 'x'"),
        ([without(X, "datatype")], "input 'x': datatype is None, but the model takes FP32"),
        ([{**X, "datatype": "FP64"}], "input 'x': datatype is 'FP64', but the model takes FP32"),
        ([{**X, "datatype": "fp32"}], "input 'x': datatype is 'fp32', but the model takes FP32"),
        ([{**X, "datatype": {}}], "input 'x': datatype is {}, but the model takes FP32"),
        (
            [{**X, "datatype": "BYTES", "data": ["a"] * 6}],
            "input 'x': datatype is 'BYTES', but the model takes FP32: this server takes numbers, not strings",
        ),
        ([without(X, "shape")], "input 'x': shape is None, not a list of non-negative integers"),
        ([{**X, "shape": 6}], "input 'x': shape is 6, not a list of non-negative integers"),
        ([{**X, "shape": [2, -3]}], "input 'x': shape is [2, -3], not a list of non-negative integers"),
        ([{**X, "shape": [2, 3.0]}], "input 'x': shape is [2, 3.0], not a list of non-negative integers"),
        ([{**X, "shape": [2, True]}], "input 'x': shape is [2, True], not a list of non-negative integers"),
        ([{**X, "shape": [2, "3"]}], "input 'x': shape is [2, '3'], not a list of non-negative integers"),
        ([{**X, "shape": []}], "input 'x': shape is [], but the model takes [-1, 3], where -1 is any size"),
        ([{**X, "shape": [6]}], "input 'x': shape is [6], but the model takes [-1, 3], where -1 is any size"),
        ([{**X, "shape": [3, 2]}], "input 'x': shape is [3, 2], but the model takes [-1, 3], where -1 is any size"),
        ([{**X, "shape": [2**62, 3]}], f"input 'x': shape is [{2**62}, 3], which is more than can be addressed"),
        ([{**X, "shape": [2**61, 3]}], f"input 'x': shape is [{2**61}, 3], which is more than can be addressed"),
        (
            [{**X, "shape": [0, 3], "data": []}],
            "input 'x': shape is [0, 3], whose batch size is 0: send at least one sample",
        ),
        (
            [{**X, "shape": [5, 3], "data": [0] * 15}],
            "input 'x': shape is [5, 3], whose batch size exceeds the maximum of 4",
        ),
        ([without(X, "data")], "input 'x': either data or the parameter binary_data_size is needed, and not both"),
        ([{**X, "data": [1, 2]}], "input 'x': data holds 2 values, but shape [2, 3] takes 6"),
        ([{**X, "data": "MTIz"}], "input 'x': data is 'MTIz', not a list"),
        (
            [{**X, "data": [[1, 2, 3], [4, 5]]}],
            "input 'x': nested data is not made of lists of 3 at axis 1 of shape [2, 3]",
        ),
        ([{**X, "data": [1, 2, 3, 4, 5, "6"]}], "input 'x': the value at index 5 is '6', and FP32 takes a number"),
        ([{**X, "data": [1, 2, 3, 4, 5, 1e39]}], "input 'x': the value at index 5 is 1e+39, which overflows FP32"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(inputs: object, message: str) -> None:
    """The message names the input, what was seen and what is expected."""
    error = refusal({"inputs": inputs})
    assert (str(error), error.reason) == (message, "invalid_input")


def test_an_overflow_hidden_behind_an_empty_size_is_refused() -> None:
    """A product of zero must not let sizes through whose strides overflow."""
    signature = Signature((TensorSpec("x", torch.float32, (-1, -1, -1, -1)),))
    error = refusal({"inputs": [{**X, "shape": [1, 0, 2**62, 2**62], "data": []}]}, signature=signature)
    assert str(error).endswith("which is more than can be addressed")


@pytest.mark.parametrize("inputs", [[IMAGE], [MASK]])
def test_every_missing_input_is_named(inputs: list[object]) -> None:
    """Next to all that the model takes."""
    missing = "'mask'" if inputs == [IMAGE] else "'image'"
    error = refusal({"inputs": inputs}, signature=TWO)
    assert str(error) == f"missing input {missing}: the model takes 'image', 'mask'"


def test_inputs_must_have_one_batch_size() -> None:
    """The message has the size of each."""
    error = refusal({"inputs": [IMAGE, {**MASK, "shape": [3], "data": [True] * 3}]}, signature=TWO)
    assert (str(error), error.reason) == (
        "the inputs differ in batch size: 'image' has 2, 'mask' has 3",
        "invalid_input",
    )


@pytest.mark.parametrize(
    ("size", "tail", "message"),
    [
        (20, bytes(24), "input 'x': binary_data_size is 20, but shape [2, 3] of FP32 takes 24 bytes"),
        (-24, bytes(24), "input 'x': binary_data_size is -24, but shape [2, 3] of FP32 takes 24 bytes"),
        (2**63, bytes(24), f"input 'x': binary_data_size is {2**63}, but shape [2, 3] of FP32 takes 24 bytes"),
        (True, bytes(24), "binary_data_size of the parameters of input 'x' must be a JSON integer, not True"),
        (24.0, bytes(24), "binary_data_size of the parameters of input 'x' must be a JSON integer, not 24.0"),
        ("24", bytes(24), "binary_data_size of the parameters of input 'x' must be a JSON integer, not '24'"),
        (
            24,
            bytes(23),
            f"input 'x': binary_data_size is 24, but 23 bytes are left after the JSON, {HINT}",
        ),
        (
            24,
            None,
            f"input 'x': binary_data_size is 24, but 0 bytes are left after the JSON, {HINT}",
        ),
        (24, bytes(25), "1 bytes are left over after the binary inputs"),
    ],
)
def test_binary_data_of_another_size_is_refused(size: object, tail: bytes | None, message: str) -> None:
    """Shape, binary_data_size and body must agree to the byte."""
    entry = {**without(X, "data"), "parameters": {"binary_data_size": size}}
    assert str(refusal({"inputs": [entry]}, tail)) == message


def test_bytes_after_a_json_request_are_refused() -> None:
    """A header that cuts the body short leaves bytes that belong to nothing."""
    error = refusal({"inputs": [X]}, b"\n")
    assert (str(error), error.reason) == ("1 bytes are left over after the binary inputs", "malformed")


def test_an_input_is_json_or_binary_but_not_both() -> None:
    """Two sources for one tensor could disagree."""
    error = refusal({"inputs": [{**X, "parameters": {"binary_data_size": 24}}]}, bytes(24))
    assert str(error) == "input 'x': either data or the parameter binary_data_size is needed, and not both"


@pytest.mark.parametrize(("dtype", "datatype"), [(torch.float16, "FP16"), (torch.bfloat16, "BF16")])
def test_half_precision_has_no_json_form(dtype: torch.dtype, datatype: str) -> None:
    """The client is told to send it in binary."""
    signature = Signature((TensorSpec("x", dtype, (-1, 3)),))
    error = refusal({"inputs": [{**X, "datatype": datatype}]}, signature=signature)
    assert str(error) == f"input 'x': {datatype} has no JSON form: send it as binary data, with binary_data_size"


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
def test_deeply_nested_data_is_refused(depth: int) -> None:
    """Neither a parser nor the flattening runs out of stack."""
    deep = b"[" * depth + b"]" * depth
    for value in (deep, deep.replace(b"[]", b"[NaN]")):
        body = orjson.dumps({"inputs": [{**X, "data": 0}]}).replace(b'"data":0', b'"data":' + value)
        with pytest.raises(ProtocolError) as caught:
            parse_request(body, None, ONE, max_batch_size=4)
        assert len(str(caught.value)) < 300


def test_nan_in_json_data_reaches_the_model_but_not_an_integer() -> None:
    """Policy on non-finite inputs is set elsewhere; an integer cannot be NaN at all."""
    body = orjson.dumps({"inputs": [{**X, "data": 0}]}).replace(b'"data":0', b'"data":[NaN,1,2,3,-Infinity,1e-3]')
    tensor = parse_request(body, None, ONE, max_batch_size=4).inputs["x"]
    assert repr(tensor[:, 1:].tolist()) == repr([[1.0, 2.0], [float("-inf"), np.float32(1e-3).item()]])
    assert tensor[0, 0].isnan()
    with pytest.raises(ProtocolError, match="the value at index 0 is nan, and INT32 takes an integer from -2147483648"):
        parse_request(
            body.replace(b"FP32", b"INT32"),
            None,
            Signature((TensorSpec("x", torch.int32, (-1, 3)),)),
            max_batch_size=4,
        )
