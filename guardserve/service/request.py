"""Inference requests of the Open Inference Protocol V2, read strictly.

What cannot be honoured exactly is refused, with a message that names the tensor, what was seen and what is expected.
An optional member that is ``null``, as some clients write it, counts as absent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shown
from typing import Any

import orjson
import torch

from guardserve.service.body import (
    HEADER_LENGTH,
    MAX_PARAMETERS,
    ProtocolError,
    json_member,
    json_object,
    json_size,
    load_json,
)
from guardserve.service.datatypes import datatype_name, decode_binary, decode_json
from guardserve.service.limits import Hold, unlimited
from guardserve.signature import Signature, TensorSpec

MAX_KNOWN = 999
"""Bytes of JSON up to which a layout is remembered."""

KNOWN_LAYOUTS = 64

SMALL = 256 * 1024
"""Bytes up to which a body or an answer is read or written on the event loop; more would keep it from others.

Nobody is told of the binary tensors of such a body before they are made: there are no more of them than of the body,
which is let go of at once.
"""


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request asks for.

    Attributes:
        name: Name of the output.
        binary: Whether to send it in binary; None leaves it to the request's ``binary_data_output``.
    """

    name: str
    binary: bool | None = None


@dataclass(eq=False)
class InferRequest:
    """An inference request whose tensors fit the model's signature.

    Attributes:
        id: Identifier to echo.
        parameters: The request's parameters, as they came.
        inputs: CPU tensors in the signature's order, each contiguous, writable and in memory of its own.
        outputs: The outputs to send, in order; None for all.
        binary_output: Whether outputs that do not say so themselves are sent in binary.
    """

    id: str | None
    parameters: Mapping[str, object]
    inputs: dict[str, torch.Tensor]
    outputs: tuple[RequestedOutput, ...] | None
    binary_output: bool


def parse_request(
    body: bytes,
    header_length: str | None,
    signature: Signature,
    *,
    max_batch_size: int | None,
    hold: Hold = unlimited,
) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: JSON, or JSON followed by binary tensors; already decompressed.
        header_length: The ``Inference-Header-Content-Length`` header. Without it the body is all JSON; "0" says that
            the body is the tensor of the model's only input, of batch size 1, and asks for binary outputs.
        signature: What the model takes and gives. If it declares no outputs, any may be asked for.
        max_batch_size: The largest batch size accepted, or None for any.
        hold: Told of the bytes of each tensor before it is made.

    Raises:
        ProtocolError: The request is malformed or does not fit the signature.
    """
    size = json_size(body, header_length)
    if size == 0 and header_length is not None:
        hold(len(body))
        inputs = _raw_input(body, signature)
        return InferRequest(id=None, parameters={}, inputs=inputs, outputs=None, binary_output=True)
    request = json_object(load_json(body, size), "the request")
    parameters = _plain(json_member(request, "parameters", dict, "the request") or {})
    outputs = _requested_outputs(request, signature)
    return InferRequest(
        id=json_member(request, "id", str, "the request"),
        parameters=parameters,
        inputs=_inputs(request, _Tail(memoryview(body)[size:]), signature, max_batch_size, hold),
        outputs=outputs,
        binary_output=json_member(parameters, "binary_data_output", bool, "the request's parameters") or False,
    )


class RequestReader:
    """Reads the requests of one model, and remembers how the last few kinds of them were laid out.

    Requests of one client mostly differ in their binary tensors alone: what stands before these need not be parsed
    and checked again when it is the same to the byte.

    Args:
        signature: What the model takes and gives.
        max_batch_size: The largest batch size accepted, or None for any.
    """

    def __init__(self, signature: Callable[[], Signature], max_batch_size: int | None) -> None:
        self._signature = signature
        self._max_batch_size = max_batch_size
        self._layouts: dict[bytes, _Layout] = {}

    def read(self, body: bytes, header_length: str | None, hold: Hold = unlimited) -> InferRequest:
        """Read a request's body, as :func:`parse_request` does."""
        if header_length is not None and header_length.isdecimal() and 0 < len(header_length) <= len(str(MAX_KNOWN)):
            head = body[: int(header_length)]
            layout = self._layouts.get(head)
            if layout is not None and layout.size == len(body):
                if len(body) > SMALL:
                    hold(len(body) - len(head))
                return layout.read(body)
        signature = self._signature()
        request = parse_request(body, header_length, signature, max_batch_size=self._max_batch_size, hold=hold)
        if header_length is not None and (size := int(header_length)) <= MAX_KNOWN:
            self._remember(body[:size], len(body), request)
        return request

    def _remember(self, head: bytes, size: int, request: InferRequest) -> None:
        """Remember a layout, if all of its tensors are binary and of a type of which any bytes are right."""
        tensors = request.inputs.values()
        if not head or len(head) + sum(tensor.nbytes for tensor in tensors) != size:
            return
        if any(tensor.dtype is torch.bool for tensor in tensors):
            return
        order = [entry["name"] for entry in orjson.loads(head)["inputs"]]
        if len(self._layouts) >= KNOWN_LAYOUTS:
            self._layouts.clear()
        self._layouts[head] = _Layout(len(head), size, order, replace(request, inputs={}), dict(request.inputs))


class _Layout:
    """Where the tensors of a request are.

    Args:
        start: Bytes before the first.
        size: Bytes of the whole body.
        order: Names of the inputs in the order of the body.
        request: The request without its inputs.
        inputs: Tensors of the shapes and types of the inputs, in the signature's order.
    """

    def __init__(
        self, start: int, size: int, order: Sequence[str], request: InferRequest, inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self.size = size
        self._request = request
        places = {}
        for name in order:
            places[name] = (start, start + inputs[name].nbytes)
            start += inputs[name].nbytes
        self._parts = [(name, *places[name], tensor.dtype, tuple(tensor.shape)) for name, tensor in inputs.items()]

    def read(self, body: bytes) -> InferRequest:
        """Read a body of this layout."""
        view, known = memoryview(body), self._request
        inputs = {name: decode_binary(view[start:end], dtype, shape) for name, start, end, dtype, shape in self._parts}
        return InferRequest(known.id, known.parameters, inputs, known.outputs, known.binary_output)


class _Tail:
    """The binary tensors behind the JSON, taken one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def take(self, size: int) -> memoryview:
        if size > len(self.data):
            raise ValueError(
                f"binary_data_size is {size}, but {len(self.data)} bytes are left after the JSON, "
                f"whose length belongs in the header {HEADER_LENGTH}"
            )
        taken, self.data = self.data[:size], self.data[size:]
        return taken


def _inputs(
    request: Mapping[str, Any], tail: _Tail, signature: Signature, max_batch_size: int | None, hold: Hold
) -> dict[str, torch.Tensor]:
    specs = {spec.name: spec for spec in signature.inputs}
    tensors: dict[str, torch.Tensor] = {}
    entries = json_member(request, "inputs", list, "the request") or ()
    for value in entries:  # in the order of the request, which the binary data follows
        entry = json_object(value, "an entry of inputs")
        name = entry.get("name")
        if not isinstance(name, str) or name not in specs:
            raise ProtocolError(f"unknown input {shown(name)}: the model takes {_quoted(specs)}", "invalid_input")
        if name in tensors:
            raise ProtocolError(f"input {name!r} is given twice", "invalid_input")
        try:
            tensors[name] = _input(entry, specs[name], tail, max_batch_size, hold)
        except ValueError as error:
            raise ProtocolError(f"input {name!r}: {error}", "invalid_input") from None
    if missing := [name for name in specs if name not in tensors]:
        raise ProtocolError(f"missing input {_quoted(missing)}: the model takes {_quoted(specs)}", "invalid_input")
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        sizes = ", ".join(f"{name!r} has {len(tensor)}" for name, tensor in tensors.items())
        raise ProtocolError(f"the inputs differ in batch size: {sizes}", "invalid_input")
    if tail.data:
        raise ProtocolError(f"{len(tail.data)} bytes are left over after the binary inputs")
    return {name: tensors[name] for name in specs}


def _input(
    entry: Mapping[str, Any], spec: TensorSpec, tail: _Tail, max_batch_size: int | None, hold: Hold
) -> torch.Tensor:
    expected, datatype = datatype_name(spec.dtype), entry.get("datatype")
    if datatype != expected:
        hint = ": this server takes numbers, not strings" if datatype == "BYTES" else ""
        raise ValueError(f"datatype is {shown(datatype)}, but the model takes {expected}{hint}")
    shape = _shape(entry.get("shape"), spec, max_batch_size)
    where = f"input {spec.name!r}"
    size = json_member(_parameters(entry, where), "binary_data_size", int, f"the parameters of {where}")
    if (size is None) == (entry.get("data") is None):
        raise ValueError("either data or the parameter binary_data_size is needed, and not both")
    needed = math.prod(shape) * spec.dtype.itemsize
    if size is None:
        return decode_json(entry["data"], spec.dtype, shape, hold)
    if size != needed:
        raise ValueError(f"binary_data_size is {size}, but shape {list(shape)} of {expected} takes {needed} bytes")
    data = tail.take(size)
    hold(size)
    return decode_binary(data, spec.dtype, shape)


def _shape(value: object, spec: TensorSpec, max_batch_size: int | None) -> tuple[int, ...]:
    """Check a shape against the model's, before anything of its size is allocated."""
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"shape is {shown(value)}, not a list of non-negative integers")
    if len(value) != len(spec.shape) or any(want not in (-1, got) for want, got in zip(spec.shape, value, strict=True)):
        raise ValueError(f"shape is {shown(value)}, but the model takes {list(spec.shape)}, where -1 is any size")
    if math.prod(size or 1 for size in value) * spec.dtype.itemsize > sys.maxsize:
        raise ValueError(f"shape is {value}, which is more than can be addressed")
    if value[0] == 0:
        raise ValueError(f"shape is {value}, whose batch size is 0: send at least one sample")
    if max_batch_size is not None and value[0] > max_batch_size:
        raise ValueError(f"shape is {value}, whose batch size exceeds the maximum of {max_batch_size}")
    return tuple(value)


def _raw_input(body: bytes, signature: Signature) -> dict[str, torch.Tensor]:
    """Read a body without JSON: one sample of the only input, whose one free size, if any, follows from the length."""
    if len(signature.inputs) != 1:
        names = _quoted(spec.name for spec in signature.inputs)
        raise ProtocolError(f"{HEADER_LENGTH} is 0, which is for models of one input; this one takes {names}")
    spec = signature.inputs[0]
    sizes = spec.shape[1:]
    unit = math.prod(size for size in sizes if size != -1) * spec.dtype.itemsize
    shape = (1, *(len(body) // max(unit, 1) if size == -1 else size for size in sizes))
    if spec.shape[0] not in (-1, 1) or sizes.count(-1) > 1 or math.prod(shape) * spec.dtype.itemsize != len(body):
        raise ProtocolError(
            f"input {spec.name!r}: a raw body of {len(body)} bytes is not one sample of shape {list(spec.shape)} "
            f"of {datatype_name(spec.dtype)}",
            "invalid_input",
        )
    try:
        return {spec.name: decode_binary(memoryview(body), spec.dtype, shape)}
    except ValueError as error:
        raise ProtocolError(f"input {spec.name!r}: {error}", "invalid_input") from None


def _requested_outputs(request: Mapping[str, Any], signature: Signature) -> tuple[RequestedOutput, ...] | None:
    known = [spec.name for spec in signature.outputs]
    requested: dict[str, RequestedOutput] = {}
    for value in json_member(request, "outputs", list, "the request") or ():
        entry = json_object(value, "an entry of outputs")
        name = entry.get("name")
        if not isinstance(name, str) or (known and name not in known):
            raise unknown_output(name, known)
        where = f"output {shown(name)}"
        if name in requested:
            raise ProtocolError(f"{where} is requested twice")
        requested[name] = RequestedOutput(
            name, json_member(_parameters(entry, where), "binary_data", bool, f"the parameters of {where}")
        )
    return tuple(requested.values()) or None


def unknown_output(name: object, known: Iterable[str]) -> ProtocolError:
    """Return the error for an output that the model does not give; ``known`` is what it gives, if that is known."""
    gives = f": the model gives {_quoted(known)}" if known else ""
    return ProtocolError(f"unknown output {shown(name)}{gives}", "unknown_output")


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Refuse parameters that would take much memory for as long as a request waits: the protocol has none of these."""
    if len(parameters) > MAX_PARAMETERS:
        raise ProtocolError(f"the request has {len(parameters)} parameters, more than the {MAX_PARAMETERS} allowed")
    for key, value in parameters.items():
        if isinstance(value, (dict, list)):
            raise ProtocolError(
                f"{shown(key)} of the request's parameters is {shown(value)}, not a string, number or boolean"
            )
    return parameters


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of a tensor, refusing the extensions that would change what is sent."""
    parameters = json_member(entry, "parameters", dict, where) or {}
    for key, value in parameters.items():
        if (key == "classification" or key.startswith("shared_memory_")) and value is not None:
            raise ProtocolError(f"{shown(key)} of {where} is not supported by this server")
    return parameters


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
