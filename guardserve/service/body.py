"""The body of a request: its compression, the JSON at its start, and the members of that JSON."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

import orjson

from guardserve.exceptions import GuardserveError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header with the byte count of the JSON that binary tensors follow."""

MAX_CONTAINERS = 2**20
"""Lists and objects in a request's JSON: each takes many times the memory of the two bytes that write it."""

Reason: TypeAlias = Literal["malformed", "invalid_input", "unknown_output", "too_large", "unsupported_encoding"]
"""Why a request was refused, as a metrics label.

- ``malformed``: the body, or something that it asks for, is not what this server can read
- ``invalid_input``: an input does not fit the model, or its data does not fit its shape or datatype
- ``unknown_output``: a requested output is not one of the model's
- ``too_large``: the body exceeds the limit once decompressed
- ``unsupported_encoding``: the body's Content-Encoding, or its kind of image, is not understood
"""

_T = TypeVar("_T")
_JSON_TYPES: dict[type, str] = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer"}
_WBITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's codes for the gzip and the zlib format
_WINDOW = 16 * 1024
_MAX_GZIP_MEMBERS = 10_000  # an empty member is 20 bytes: without a bound a small body could ask for millions


class ProtocolError(GuardserveError):
    """A request that must be refused.

    Attributes:
        reason: Why, for metrics.
        status: HTTP status of the refusal.
    """

    def __init__(self, message: str, reason: Reason = "malformed", *, status: int = 400) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.status = status


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a Content-Encoding while never holding much more than ``limit`` bytes of the result.

    Args:
        body: The body as received.
        encoding: ``gzip`` (of one or more members), ``deflate`` (the zlib format), or ``identity``, which None means.
        limit: The most bytes that the result may have.

    Raises:
        ProtocolError: 413 for a larger result, 415 for another encoding, 400 for data that is corrupt, truncated or
            followed by something else.
    """
    coding = (encoding or "identity").strip().lower()
    if coding == "identity":
        return body if len(body) <= limit else _refuse_size(limit)
    if coding not in _WBITS:
        raise ProtocolError(
            f"Content-Encoding {shown(encoding)} is not supported: send gzip, deflate or identity",
            "unsupported_encoding",
            status=415,
        )
    try:
        return _inflate(body, _WBITS[coding], limit, streams=1 if coding == "deflate" else _MAX_GZIP_MEMBERS)
    except zlib.error as error:
        raise ProtocolError(f"the body is not valid {coding}: {error}") from None


def _inflate(body: bytes, wbits: int, limit: int, streams: int) -> bytes:
    """Decompress a body made of at most that many streams; small windows, as zlib copies what follows a stream."""
    view, position, output = memoryview(body), 0, bytearray()
    for _ in range(streams):
        stream = zlib.decompressobj(wbits)
        while not stream.eof:
            window = view[position : position + _WINDOW]
            if not window:
                raise ProtocolError("the compressed body is truncated")
            output += stream.decompress(window, limit + 1 - len(output))
            if len(output) > limit:
                _refuse_size(limit)
            position += len(window) - len(stream.unused_data)
        if position == len(body):
            return bytes(output)
    raise ProtocolError(f"{len(body) - position} bytes follow the compressed body, or it has too many members")


def _refuse_size(limit: int) -> NoReturn:
    raise ProtocolError(f"the body is larger than the {limit} bytes allowed", "too_large", status=413)


def json_size(body: bytes, header_length: str | None) -> int:
    """Return how many bytes at the start of the body are its JSON.

    Raises:
        ProtocolError: The header is not a whole number, or exceeds the body.
    """
    if header_length is None:
        return len(body)
    if not re.fullmatch("[0-9]{1,18}", header_length):
        raise ProtocolError(f"{HEADER_LENGTH} is {shown(header_length)}, not a whole number of bytes")
    if int(header_length) > len(body):
        raise ProtocolError(f"{HEADER_LENGTH} is {int(header_length)}, but the body has {len(body)} bytes")
    return int(header_length)


def load_json(body: bytes, size: int) -> object:
    """Parse the first ``size`` bytes of the body, accepting NaN and infinities in the data of inputs.

    Raises:
        ProtocolError: They are not JSON, or nested too deeply, or hold too many lists and objects.
    """
    if size > MAX_CONTAINERS and body.count(b"[", 0, size) + body.count(b"{", 0, size) > MAX_CONTAINERS:
        text = f"the request's JSON holds more than {MAX_CONTAINERS} lists and objects: send data flat, or in binary"
        raise ProtocolError(text, "too_large", status=413)
    try:
        return orjson.loads(memoryview(body)[:size])
    except orjson.JSONDecodeError as error:
        if body.find(b"NaN", 0, size) < 0 and body.find(b"Infinity", 0, size) < 0:
            raise ProtocolError(f"the request is not valid JSON: {error}") from None
    try:
        return _load_non_finite(body[:size].decode())
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"the request is not valid JSON: {error}") from None


def _load_non_finite(text: str) -> object:
    """Parse what JSON lacks but some clients write: the literals NaN, Infinity and -Infinity.

    Everything but the data of inputs must survive orjson, which also refuses the rest of what Python's parser lets
    through: lone surrogates and integers beyond 64 bits.
    """
    request = json.loads(text, parse_float=_finite)
    rest = request
    if isinstance(request, dict) and isinstance(inputs := request.get("inputs"), list):
        rest = {**request, "inputs": [{**entry, "data": 0} if isinstance(entry, dict) else entry for entry in inputs]}
    if orjson.loads(orjson.dumps(rest)) != rest:
        raise ValueError("NaN and Infinity are accepted in the data of inputs alone")
    return request


def _finite(literal: str) -> float:
    """Convert a decimal, refusing one so large that Python would make it infinite."""
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {shown(literal)} is too large")
    return value


def json_object(value: object, where: str) -> dict[str, Any]:
    """Return a parsed JSON value that must be an object; ``where`` is what an error calls it."""
    if not isinstance(value, dict):
        raise ProtocolError(f"{where} must be a JSON object, not {shown(value)}")
    return value


def json_member(members: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T | None:
    """Return an optional member, which must be of exactly that type: a boolean is no integer here."""
    value = members.get(key)
    if value is None or type(value) is kind:
        return value
    raise ProtocolError(f"{key} of {where} must be a JSON {_JSON_TYPES[kind]}, not {shown(value)}")
