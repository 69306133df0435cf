"""The protocol end to end, with tritonclient's own request builder and response parser as the other side."""

from __future__ import annotations

import json
from typing import Any, cast

import ml_dtypes
import numpy as np
import orjson
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tritonclient import http

from guardserve.service.datatypes import BINARY_ONLY, datatype_name
from guardserve.service.protocol import (
    HEADER_LENGTH,
    InferRequest,
    ProtocolError,
    RequestedOutput,
    decompress,
    model_metadata,
    parse_request,
    render_response,
    server_metadata,
)
from guardserve.signature import DATATYPES, Signature, TensorSpec

JSON_DATATYPES = sorted(name for name, dtype in DATATYPES.items() if dtype not in BINARY_ONLY)
Array = np.ndarray[Any, np.dtype[Any]]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the numpy dtype that tritonclient uses for a torch dtype."""
    return (
        np.dtype(ml_dtypes.bfloat16) if dtype is torch.bfloat16 else np.dtype(torch.zeros(0, dtype=dtype).numpy().dtype)
    )


def random_array(dtype: torch.dtype, shape: tuple[int, ...]) -> Array:
    """Make an array of arbitrary bits, NaN payloads among them; BOOL is the exception."""
    random = np.random.default_rng(0)
    kind = numpy_dtype(dtype)
    if dtype is torch.bool:
        return random.integers(0, 2, shape).astype(bool)
    return np.frombuffer(random.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)


def finite(array: Array) -> Array:
    """Replace what JSON cannot express."""
    return array if array.dtype.kind in "biu" else np.where(np.isfinite(array), array, 0).astype(array.dtype)


def tensor_of(array: Array) -> torch.Tensor:
    """Convert what tritonclient takes or gives to a tensor, keeping every bit."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy().tobytes()


def client_request(
    inputs: dict[str, tuple[Array, bool]], outputs: dict[str, bool] | None = None, **options: object
) -> tuple[bytes, str | None]:
    """Build a request with tritonclient: arrays by name, each binary or not, and the wanted outputs likewise."""
    given_ = []
    for name, (array, binary) in inputs.items():
        entry = http.InferInput(name, list(array.shape), datatype_name(tensor_of(array).dtype))
        given_.append(entry.set_data_from_numpy(array, binary_data=binary))
    wanted = [http.InferRequestedOutput(name, binary_data=binary) for name, binary in (outputs or {}).items()]
    body, size = http.InferenceServerClient.generate_request_body(given_, outputs=wanted, **options)
    return body, None if size is None else str(size)


def client_response(body: bytes, headers: dict[str, str]) -> Any:
    """Read a response with tritonclient."""
    size = headers.get(HEADER_LENGTH)
    return http.InferenceServerClient.parse_response_body(body, header_length=None if size is None else int(size))


def request_for(outputs: tuple[RequestedOutput, ...] | None = None, *, binary: bool = False) -> InferRequest:
    """Make a request of which only what concerns the response matters."""
    return InferRequest(id=None, parameters={}, inputs={}, outputs=outputs, binary_output=binary)


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_tritonclient_and_the_server_agree_on_binary_data(datatype: str) -> None:
    """Every datatype survives both directions to the bit, in tritonclient's default mode."""
    array = random_array(DATATYPES[datatype], (3, 2, 5))
    signature = Signature((TensorSpec("x", DATATYPES[datatype], (-1, 2, -1)),))
    body, header = client_request({"x": (array, True)})
    request = parse_request(body, header, signature, max_batch_size=None)
    assert bits(request.inputs["x"]) == array.tobytes()
    assert request.binary_output
    result = client_response(*render_response(request.inputs, request, model_name="m"))
    assert result.as_numpy("x").tobytes() == array.tobytes()
    assert result.as_numpy("x").shape == (3, 2, 5)


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
def test_tritonclient_and_the_server_agree_on_json_data(datatype: str) -> None:
    """Every datatype that has a JSON form survives both directions to the bit."""
    array = finite(random_array(DATATYPES[datatype], (3, 2, 5)))
    signature = Signature((TensorSpec("x", DATATYPES[datatype], (-1, 2, -1)),))
    body, header = client_request({"x": (array, False)}, {"x": False})
    assert header is None
    request = parse_request(body, header, signature, max_batch_size=None)
    assert bits(request.inputs["x"]) == array.tobytes()
    assert request.outputs == (RequestedOutput("x", binary=False),)
    rendered, headers = render_response(request.inputs, request, model_name="m")
    assert headers == {"Content-Type": "application/json"}
    assert client_response(rendered, headers).as_numpy("x").tobytes() == array.tobytes()


def test_tritonclient_and_the_server_agree_on_several_tensors() -> None:
    """Binary and JSON tensors mix in requests and responses, with identifier and order kept."""
    arrays = {name: finite(random_array(DATATYPES[name], (2, 3))) for name in ("UINT8", "FP64", "BOOL", "INT16")}
    signature = Signature(tuple(TensorSpec(name, DATATYPES[name], (-1, 3)) for name in sorted(arrays)))
    binary = {"UINT8": True, "FP64": True, "BOOL": False, "INT16": True}
    body, header = client_request(
        {name: (array, binary[name]) for name, array in arrays.items()},
        {"INT16": True, "BOOL": False, "FP64": True},
        request_id="request 7",
        priority=3,
        parameters={"custom": "value"},
    )
    request = parse_request(body, header, signature, max_batch_size=2)
    assert list(request.inputs) == sorted(arrays)
    assert {name: bits(tensor) for name, tensor in request.inputs.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    assert request.parameters == {"priority": 3, "custom": "value"}
    result = client_response(*render_response(request.inputs, request, model_name="m", model_version="2"))
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("request 7", "m", "2")
    assert [output["name"] for output in answer["outputs"]] == ["INT16", "BOOL", "FP64"]
    assert ["data" in output for output in answer["outputs"]] == [False, True, False]
    for name in ("INT16", "BOOL", "FP64"):
        assert result.as_numpy(name).tobytes() == arrays[name].tobytes()
    assert result.as_numpy("UINT8") is None


def test_nan_from_tritonclient_is_read_in_both_forms() -> None:
    """It writes NaN literals in JSON, and the plain bits in binary."""
    array = np.array([[np.nan, np.inf, -np.inf, 1.5]], np.float32)
    signature = Signature((TensorSpec("x", torch.float32, (-1, 4)),))
    for binary in (False, True):
        body, header = client_request({"x": (array, binary)})
        tensor = parse_request(body, header, signature, max_batch_size=1).inputs["x"]
        assert np.array_equal(tensor.numpy(), array, equal_nan=True)


def test_shared_memory_and_classification_of_tritonclient_are_refused() -> None:
    """The client's own builders write what the server names in its refusal."""
    signature = Signature((TensorSpec("x", torch.float32, (-1,)),), (TensorSpec("y", torch.float32, (-1,)),))
    plain = http.InferInput("x", [1], "FP32").set_data_from_numpy(np.ones(1, np.float32))
    shared = http.InferInput("x", [1], "FP32").set_shared_memory("region", 4)
    for entry, output, named in [
        (shared, http.InferRequestedOutput("y"), "'shared_memory_region' of input 'x'"),
        (plain, http.InferRequestedOutput("y", class_count=3), "'classification' of output 'y'"),
    ]:
        body, size = http.InferenceServerClient.generate_request_body([entry], outputs=[output])
        with pytest.raises(ProtocolError, match=f"{named} is not supported by this server"):
            parse_request(body, None if size is None else str(size), signature, max_batch_size=None)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draw one to three tensors of one batch size, of any datatype, shape and bits."""
    batch = draw(st.integers(1, 3))
    drawn = {}
    for index in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(DATATYPES.values())))
        shape = (batch, *draw(st.lists(st.integers(0, 3), max_size=2)))
        size = int(np.prod(shape)) * dtype.itemsize
        element = st.integers(0, 1 if dtype is torch.bool else 255)
        payload = bytes(draw(st.lists(element, min_size=size, max_size=size)))
        drawn[f"t{index}"] = tensor_of(np.frombuffer(payload, numpy_dtype(dtype)).reshape(shape))
    return drawn


def expressible(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has a JSON form."""
    return tensor.dtype not in BINARY_ONLY and not (tensor.is_floating_point() and not tensor.isfinite().all())


@given(tensors(), st.data())
@settings(deadline=None)
def test_a_response_sent_back_as_a_request_is_the_same(outputs: dict[str, torch.Tensor], data: st.DataObject) -> None:
    """A response's outputs have the form of a request's inputs, so that reading inverts writing, to the bit."""
    wanted = tuple(
        RequestedOutput(name, data.draw(st.sampled_from([True, False, None])) if expressible(tensor) else True)
        for name, tensor in data.draw(st.permutations(list(outputs.items())))
    )
    request = request_for(wanted, binary=data.draw(st.booleans()))
    body, headers = render_response(outputs, request, model_name="m")
    size = int(headers.get(HEADER_LENGTH, len(body)))
    response = orjson.loads(body[:size])
    assert [entry["name"] for entry in response["outputs"]] == [output.name for output in wanted]
    head = orjson.dumps({"inputs": response["outputs"]})
    signature = Signature(
        tuple(TensorSpec(name, tensor.dtype, (-1, *tensor.shape[1:])) for name, tensor in outputs.items())
    )
    parsed = parse_request(head + body[size:], str(len(head)), signature, max_batch_size=3)
    assert list(parsed.inputs) == list(outputs)
    for name, tensor in outputs.items():
        assert parsed.inputs[name].shape == tensor.shape
        assert bits(parsed.inputs[name]) == bits(tensor)


def test_the_json_response_has_the_form_of_the_standard() -> None:
    """Data is flat and row-major next to its shape, and FP32 is as short as it can be."""
    outputs = {"y": torch.tensor([[0.1, -0.0], [3e38, 1e-45]]), "label": torch.tensor([True, False])}
    body, headers = render_response(outputs, request_for(), model_name="m", parameters={"note": "x", "score": 0.5})
    assert headers == {"Content-Type": "application/json"}
    assert json.loads(body) == {
        "model_name": "m",
        "parameters": {"note": "x", "score": 0.5},
        "outputs": [
            {"name": "y", "shape": [2, 2], "datatype": "FP32", "data": [0.1, -0.0, 3e38, 1e-45]},
            {"name": "label", "shape": [2], "datatype": "BOOL", "data": [True, False]},
        ],
    }


def test_the_binary_response_has_the_form_of_the_extension() -> None:
    """The JSON comes first, as long as the header says, then the tensors in its order, unpadded."""
    outputs = {"a": torch.tensor([1, 2, 3], dtype=torch.uint8), "b": torch.tensor([1.0])}
    body, headers = render_response(outputs, request_for(binary=True), model_name="m")
    size = int(headers[HEADER_LENGTH])
    assert headers == {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(size)}
    assert json.loads(body[:size])["outputs"] == [
        {"name": "a", "shape": [3], "datatype": "UINT8", "parameters": {"binary_data_size": 3}},
        {"name": "b", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
    ]
    assert body[size:] == b"\1\2\3\0\0\x80\x3f"


@pytest.mark.parametrize("everything_binary", [True, False])
def test_an_output_overrides_the_requests_choice(everything_binary: bool) -> None:
    """``binary_data`` of an output beats ``binary_data_output`` of the request, both ways; the rest follow it."""
    outputs = {name: torch.ones(2) for name in ("yes", "no", "open")}
    wanted = (RequestedOutput("open"), RequestedOutput("no", binary=False), RequestedOutput("yes", binary=True))
    body, headers = render_response(outputs, request_for(wanted, binary=everything_binary), model_name="m")
    entries = json.loads(body[: int(headers[HEADER_LENGTH])])["outputs"]
    binary = {entry["name"]: "parameters" in entry for entry in entries}
    assert binary == {"open": everything_binary, "no": False, "yes": True}


def test_an_identifier_is_echoed_and_an_absent_one_is_not_invented() -> None:
    """Even the empty string is an identifier."""
    for identifier, members in [("\u00e9 7", {"id": "\u00e9 7"}), ("", {"id": ""}), (None, {})]:
        request = InferRequest(id=identifier, parameters={}, inputs={}, outputs=None, binary_output=False)
        assert json.loads(render_response({}, request, model_name="m")[0]) == {
            "model_name": "m",
            **members,
            "outputs": [],
        }


@pytest.mark.parametrize(("dtype", "datatype"), [(torch.float16, "FP16"), (torch.bfloat16, "BF16")])
def test_a_half_precision_output_in_json_is_refused(dtype: torch.dtype, datatype: str) -> None:
    """The client is told how to get it."""
    with pytest.raises(
        ProtocolError, match=f"output 'y' is {datatype}, which has no JSON form: ask for it with"
    ) as caught:
        render_response({"y": torch.ones(1, dtype=dtype)}, request_for(), model_name="m")
    assert (caught.value.status, caught.value.reason) == (400, "malformed")
    render_response({"y": torch.ones(1, dtype=dtype)}, request_for(binary=True), model_name="m")


def test_an_output_that_the_model_did_not_give_is_refused() -> None:
    """That is found here when the signature declared no outputs."""
    with pytest.raises(ProtocolError, match="unknown output 'z': the model gives 'a', 'b'") as caught:
        render_response({"a": torch.ones(1), "b": torch.ones(1)}, request_for((RequestedOutput("z"),)), model_name="m")
    assert (caught.value.status, caught.value.reason) == (400, "unknown_output")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_output_is_never_written_as_json(value: float) -> None:
    """It is an error that names the output in JSON, and itself in binary."""
    outputs = {"y": torch.tensor([[1.0, value]])}
    with pytest.raises(ValueError, match="output 'y': a value is NaN or infinite, which JSON cannot express"):
        render_response(outputs, request_for(), model_name="m")
    result = client_response(*render_response(outputs, request_for(binary=True), model_name="m"))
    assert np.array_equal(result.as_numpy("y"), outputs["y"].numpy(), equal_nan=True)


def test_metadata_describes_the_model_and_the_server() -> None:
    """Shapes include the batch dimension, and -1 is a size that is free."""
    signature = Signature((TensorSpec("x", torch.float32, (-1, 3, -1)),), (TensorSpec("y", torch.bfloat16, (-1, 2)),))
    assert model_metadata("m", ("1", "2"), "pytorch", signature) == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "pytorch",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, -1]}],
        "outputs": [{"name": "y", "datatype": "BF16", "shape": [-1, 2]}],
    }
    assert server_metadata("guardserve", "1.2") == {
        "name": "guardserve",
        "version": "1.2",
        "extensions": ["binary_tensor_data"],
    }


FUZZED = Signature(
    (TensorSpec("a", torch.float32, (-1, 2)), TensorSpec("b", torch.uint8, (-1, -1))),
    (TensorSpec("y", torch.float32, (-1, 2)),),
)
SINGLE = Signature((TensorSpec("a", torch.float32, (-1, -1)),))
VALID = client_request(
    {"a": (np.array([[0.5, 2], [1e-3, 7]], np.float32), False), "b": (np.array([[3], [4]], np.uint8), True)},
    {"y": False},
    request_id="fuzz",
)
codings = st.sampled_from([None, "identity", "gzip", "deflate", "br"])
json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def outcome(body: bytes, header: str | None, coding: str | None, signature: Signature) -> InferRequest | ProtocolError:
    """Serve a request as the service would."""
    try:
        request = parse_request(decompress(body, coding, 10_000), header, signature, max_batch_size=4)
        render_response({"y": torch.ones(1)}, request, model_name="m")
    except ProtocolError as error:
        return error
    return request


def check(body: bytes, header: str | None, coding: str | None = None, signature: Signature = FUZZED) -> None:
    """Check that a request is served with tensors that fit, or refused with a status and a message to send."""
    request = outcome(body, header, coding, signature)
    if isinstance(request, ProtocolError):
        assert request.status in (400, 413, 415)
        assert 0 < len(orjson.dumps({"error": str(request)})) < 1000
        return
    for spec in signature.inputs:
        tensor = request.inputs[spec.name]
        assert tensor.dtype is spec.dtype
        assert 1 <= len(tensor) <= 4
        assert all(want in (-1, got) for want, got in zip(spec.shape, tensor.shape, strict=True))
        assert tensor.is_contiguous()
        tensor.zero_()


@given(st.binary(max_size=300), st.none() | st.text(max_size=3) | st.integers(-1, 300).map(str), codings)
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_are_refused_in_the_protocols_terms(
    body: bytes, header: str | None, coding: str | None
) -> None:
    """No body, header or coding causes another error."""
    check(body, header, coding)
    check(body, header, coding, SINGLE)


@given(st.data())
@settings(deadline=None, max_examples=500)
def test_mutated_bytes_are_served_or_refused(data: st.DataObject) -> None:
    """No damage to a valid body causes another error."""
    body, size = VALID[0], int(cast("str", VALID[1]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(body)))
        end = start + data.draw(st.integers(0, 4))
        snippet = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"NaN", b"[", b'"', b"1e999", b"-", b"null", b"\\ud800"])
        )
        body = body[:start] + snippet + body[end:]
        if end <= size and data.draw(st.booleans()):
            size += len(snippet) - (end - start)
    check(body, data.draw(st.sampled_from([str(size), VALID[1], None])))


def paths(tree: object, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the path of every value in a JSON tree."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    return [prefix, *(path for key, value in items for path in paths(value, (*prefix, key)))]


def replaced(tree: Any, path: tuple[Any, ...], value: object) -> Any:
    """Return a JSON tree with the value at a path replaced."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


@given(st.data())
@settings(deadline=None, max_examples=500)
def test_mutated_json_is_served_or_refused(data: st.DataObject) -> None:
    """No value of any type, anywhere in a valid request, causes another error."""
    size = int(cast("str", VALID[1]))
    request = json.loads(VALID[0][:size])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths(request)))
        request = replaced(request, path, data.draw(json_trees))
    head = json.dumps(request).encode()
    assume(len(head) < 5000)
    check(head + VALID[0][size:], str(len(head)))


def test_the_valid_body_of_the_fuzz_tests_is_valid() -> None:
    """Otherwise they would only ever see one refusal."""
    request = parse_request(*VALID, FUZZED, max_batch_size=4)
    assert (request.id, request.inputs["b"].tolist()) == ("fuzz", [[3], [4]])
