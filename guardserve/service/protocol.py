"""The Open Inference Protocol V2 with its binary tensor data extension.

A request's body goes through :func:`decompress` and :func:`parse_request`; responses and metadata are written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import orjson
import torch

from guardserve.service.body import HEADER_LENGTH, ProtocolError, Reason, decompress
from guardserve.service.datatypes import BINARY_ONLY, datatype_name, encode_binary, encode_json, encode_json_strings
from guardserve.service.request import InferRequest, RequestedOutput, parse_request, unknown_output
from guardserve.signature import Signature, TensorSpec

__all__ = [
    "HEADER_LENGTH",
    "InferRequest",
    "ProtocolError",
    "Reason",
    "RequestedOutput",
    "decompress",
    "model_metadata",
    "parse_request",
    "render_response",
    "server_metadata",
]


def render_response(
    outputs: Mapping[str, torch.Tensor],
    request: InferRequest,
    *,
    model_name: str,
    model_version: str | None = None,
    parameters: Mapping[str, object] = MappingProxyType({}),
    nonfinite_strings: bool = False,
) -> tuple[bytes, dict[str, str]]:
    """Write the response to a request.

    Args:
        outputs: The model's outputs, of which the request's filter chooses.
        request: What is answered.
        model_name: Name of the model.
        model_version: Version of the model, if it has any.
        parameters: Parameters of the response.
        nonfinite_strings: Whether JSON has "NaN", "Infinity" and "-Infinity" for what it cannot express.

    Returns:
        The body and its HTTP headers.

    Raises:
        ProtocolError: The request asks for an output that there is not, or for FP16 or BF16 in JSON.
        ValueError: An output to be sent in JSON is not finite: check that before.
    """
    entries: list[dict[str, object]] = []
    tail: list[memoryview] = []
    for wanted in request.outputs or map(RequestedOutput, outputs):
        if wanted.name not in outputs:
            raise unknown_output(wanted.name, outputs)
        binary = request.binary_output if wanted.binary is None else wanted.binary
        entries.append(_render_output(wanted.name, outputs[wanted.name], tail if binary else None, nonfinite_strings))
    response = {
        "model_name": model_name,
        **({} if model_version is None else {"model_version": model_version}),
        **({} if request.id is None else {"id": request.id}),
        **({"parameters": dict(parameters)} if parameters else {}),
        "outputs": entries,
    }
    head = orjson.dumps(response, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _render_output(
    name: str, tensor: torch.Tensor, tail: list[memoryview] | None, nonfinite_strings: bool
) -> dict[str, object]:
    """Describe an output, with its data in JSON or, if there is a tail, appended to that."""
    datatype = datatype_name(tensor.dtype)
    entry: dict[str, object] = {"name": name, "shape": list(tensor.shape), "datatype": datatype}
    if tail is not None:
        tail.append(encode_binary(tensor))
        return {**entry, "parameters": {"binary_data_size": tail[-1].nbytes}}
    if tensor.dtype in BINARY_ONLY:
        raise ProtocolError(f"output {name!r} is {datatype}, which has no JSON form: ask for it with binary_data true")
    try:
        return {**entry, "data": encode_json(tensor)}
    except ValueError as error:
        if nonfinite_strings:
            return {**entry, "data": encode_json_strings(tensor)}
        raise ValueError(f"output {name!r}: {error}") from None


def model_metadata(name: str, versions: Sequence[str], platform: str, signature: Signature) -> dict[str, object]:
    """Describe a model to its clients; -1 in a shape is any size, and the batch dimension is included."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": platform,
        "inputs": [_tensor_metadata(spec) for spec in signature.inputs],
        "outputs": [_tensor_metadata(spec) for spec in signature.outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": datatype_name(spec.dtype), "shape": list(spec.shape)}


def server_metadata(name: str, version: str) -> dict[str, object]:
    """Describe this server, with the protocol extensions that it speaks."""
    return {"name": name, "version": version, "extensions": ["binary_tensor_data"]}
