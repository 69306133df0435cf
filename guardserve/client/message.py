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
        ClientError: If it is not one.
    """
    try:
        size = len(body) if header_length is None else int(header_length)
        answer = orjson.loads(body[:size])
        rest, outputs = memoryview(body)[size:], {}
        for entry in answer["outputs"]:
            count = (entry.get("parameters") or {}).get("binary_data_size")
            if count is None:
                outputs[entry["name"]] = from_json(entry["data"], entry["datatype"], entry["shape"])
            else:
                outputs[entry["name"]] = decode(rest[:count], entry["datatype"], entry["shape"])
                rest = rest[count:]
        return Outputs(outputs, answer)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ClientError(f"the server's answer is not one of the Open Inference Protocol: {error!r}") from error
