"""Inference messages as the protocol's HTTP form, which the service reads and answers, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson

from guardserve.rpc.messages import CHOICE, CLASSES
from guardserve.service.body import HEADER_LENGTH, ProtocolError

TYPED: Mapping[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
}
"""The field of the typed contents of each datatype that has one, and the numpy type of its bytes."""


def write_http(message: Any, seconds: float | None) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Write an inference request as HTTP: its body and its headers.

    Args:
        message: A ModelInferRequest.
        seconds: Time that is left for it.

    Raises:
        ProtocolError: If its contents do not fit its inputs.
    """
    parameters = _values(message.parameters)
    if seconds is not None:
        left = max(int(seconds * 1e6), 1)
        asked = parameters.get("timeout")
        parameters["timeout"] = min(left, asked) if isinstance(asked, int) and asked > 0 else left
    tail = list(_contents(message))
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
            "parameters": {**_values(tensor.parameters), "binary_data_size": len(data)},
        }
        for tensor, data in zip(message.inputs, tail, strict=True)
    ]
    outputs = [
        {"name": tensor.name, "parameters": {**_values(tensor.parameters), "binary_data": True}}
        for tensor in message.outputs
    ]
    request = {"parameters": {**parameters, "binary_data_output": True}, "inputs": inputs}
    if message.id:
        request["id"] = message.id
    if outputs:
        request["outputs"] = outputs
    head = orjson.dumps(request)
    body = b"".join([head, *tail])
    return body, [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"%d" % len(body)),
        (HEADER_LENGTH.lower().encode(), b"%d" % len(head)),
    ]


def read_http(body: bytes, head: int, raw: bool) -> Any:
    """Return the ModelInferResponse of an answer over HTTP whose tensors are all binary.

    Args:
        body: The answer.
        head: Bytes of its JSON.
        raw: Whether the outputs go out as raw bytes. Otherwise they go out typed, unless one has no such form.
    """
    answer = orjson.loads(memoryview(body)[:head])
    message = CLASSES["ModelInferResponse"](
        model_name=answer["model_name"], model_version=answer.get("model_version", ""), id=answer.get("id", "")
    )
    _set(message.parameters, answer.get("parameters", {}))
    raw = raw or any(entry["datatype"] not in TYPED for entry in answer["outputs"])
    start = head
    for entry in answer["outputs"]:
        output = message.outputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        stop = start + entry["parameters"]["binary_data_size"]
        if raw:
            message.raw_output_contents.append(body[start:stop])
        else:
            field, kind = TYPED[entry["datatype"]]
            getattr(output.contents, field).extend(np.frombuffer(body[start:stop], kind).tolist())
        start = stop
    return message


def is_raw(message: Any) -> bool:
    """Tell whether a request's tensors are raw bytes."""
    return bool(message.raw_input_contents)


def _contents(message: Any) -> Iterator[bytes]:
    """Yield the bytes of each input."""
    raw = message.raw_input_contents
    if not raw:
        yield from map(_typed, message.inputs)
        return
    if len(raw) != len(message.inputs):
        raise ProtocolError(f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs")
    for tensor in message.inputs:
        if tensor.HasField("contents"):
            raise ProtocolError(f"input {tensor.name!r} has contents, but there are raw_input_contents")
    yield from raw


def _typed(tensor: Any) -> bytes:
    """Return the bytes of an input's typed contents."""
    if tensor.datatype not in TYPED:
        if tensor.datatype in {"FP16", "BF16"}:
            raise ProtocolError(
                f"input {tensor.name!r}: {tensor.datatype} has no typed contents: send raw_input_contents",
                "invalid_input",
            )
        return b""  # what it ought to be is told by whoever knows the model
    field, kind = TYPED[tensor.datatype]
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if filled not in ([], [field]):
        raise ProtocolError(
            f"input {tensor.name!r}: contents has {', '.join(filled)}, but {tensor.datatype} belongs in {field}",
            "invalid_input",
        )
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(tensor.shape):
        raise ProtocolError(
            f"input {tensor.name!r}: contents holds {len(values)} values, but shape {list(tensor.shape)} takes "
            f"{math.prod(tensor.shape)}",
            "invalid_input",
        )
    try:
        return np.array(values, dtype=kind).tobytes()
    except OverflowError:
        limits = np.iinfo(kind)
        bad = next(value for value in values if not limits.min <= value <= limits.max)
        raise ProtocolError(
            f"input {tensor.name!r}: {bad} is not {tensor.datatype}, an integer from {limits.min} to {limits.max}",
            "invalid_input",
        ) from None


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of parameters."""
    found = {name: value.WhichOneof(CHOICE) for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in found.items() if choice is not None}


def _set(parameters: Any, values: Mapping[str, Any]) -> None:
    """Set parameters to values."""
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, int) and abs(value) <= sys.maxsize:
            parameters[name].int64_param = value
        elif isinstance(value, float):
            parameters[name].double_param = value
        else:
            parameters[name].string_param = value if isinstance(value, str) else orjson.dumps(value).decode()
