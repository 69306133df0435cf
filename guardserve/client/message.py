"""Inference requests as they are sent, and answers as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from guardserve.client.tensors import Array, decode, encode, from_json
from guardserve.exceptions import ClientError

HEADER_LENGTH = "Inference-Header-Content-Length"


class Outputs(dict[str, Array]):
    """The outputs of one inference by name, in the order in which the server sent them.

    Attributes:
        parameters: The answer's parameters, such as ``guardserve_nonfinite``.
        id: The request's identifier, if it had one.
        model_name: The model that answered.
        model_version: Its version, if the server tells.
    """

    def __init__(self, outputs: Mapping[str, Array], answer: Mapping[str, Any]) -> None:
        super().__init__(outputs)
        self.parameters: dict[str, Any] = answer.get("parameters") or {}
        self.id: str | None = answer.get("id")
        self.model_name: str | None = answer.get("model_name")
        self.model_version: str | None = answer.get("model_version")


def write_request(
    inputs: Mapping[str, object],
    outputs: Iterable[str] | None,
    parameters: Mapping[str, object],
    request_id: str | None,
) -> tuple[bytes, dict[str, str]]:
    """Write a request with binary tensors that asks for binary outputs; return its body and headers.

    Raises:
        TypeError: If an input has no datatype in the protocol.
    """
    entries, tail = [], []
    for name, value in inputs.items():
        try:
            datatype, shape, data = encode(value)
        except TypeError as error:
            raise TypeError(f"input {name!r}: {error}") from None
        parameter = {"binary_data_size": len(data)}
        entries.append({"name": name, "shape": shape, "datatype": datatype, "parameters": parameter})
        tail.append(data)
    head = orjson.dumps(
        {
            **({} if request_id is None else {"id": request_id}),
            "parameters": {"binary_data_output": True, **parameters},
            "inputs": entries,
            **({} if outputs is None else {"outputs": [{"name": name} for name in outputs]}),
        }
    )
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join([head, *tail]), headers


def read_answer(body: bytes, header_length: str | None) -> Outputs:
    """Read an answer, whose tensors may be in binary or in JSON.

    Raises:
        ClientError: If it is not one; nothing of it is guessed or passed over.
    """
    try:
        size = len(body) if header_length is None else _size(header_length, len(body))
        answer = orjson.loads(body[:size])
        return Outputs(_read_outputs(answer["outputs"], memoryview(body)[size:]), answer)
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ClientError(f"the server's answer is not one of the Open Inference Protocol: {reason}") from error


def _read_outputs(entries: list[dict[str, Any]], rest: memoryview) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for entry in entries:
        name = entry["name"]
        if not isinstance(name, str) or name in outputs:
            raise ValueError(f"an output's name is {name!r}, which is no string or another's, too")
        try:
            outputs[name], rest = _read_output(entry, rest)
        except ValueError as error:
            raise ValueError(f"output {name!r}: {error}") from None
    if rest:
        raise ValueError(f"{len(rest)} bytes are left over after the last output")
    return outputs


def _size(header_length: str, most: int) -> int:
    if not header_length.isascii() or not header_length.isdigit() or int(header_length) > most:
        raise ValueError(f"{HEADER_LENGTH} is {header_length!r} for an answer of {most} bytes")
    return int(header_length)


def _read_output(entry: Mapping[str, Any], rest: memoryview) -> tuple[Array, memoryview]:
    """Return an output, and the binary data that are left for those after it."""
    datatype, shape = entry["datatype"], entry["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"its shape is {shape!r}")
    count = (entry.get("parameters") or {}).get("binary_data_size")
    if count is None:
        return from_json(entry["data"], datatype, shape), rest
    if type(count) is not int or not 0 <= count <= len(rest):
        raise ValueError(f"its binary_data_size is {count!r}, where {len(rest)} bytes are left")
    return decode(rest[:count], datatype, shape), rest[count:]
