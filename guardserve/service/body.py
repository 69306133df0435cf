"""The body of a request: its compression, the JSON at its start, and the members of that JSON."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

import orjson

from guardserve.exceptions import GuardserveError
from guardserve.service.array_text import PIECE, TooLongError, cut_arrays, explained
from guardserve.service.duplicates import duplicate, surely_unique
from guardserve.service.limits import Hold, unlimited

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header with the byte count of the JSON that binary tensors follow."""

MAX_WHOLE = 256 * 1024
"""Bytes of JSON up to which it is parsed at once, data and all."""

MAX_REST = 512 * 1024
"""Bytes of longer JSON beside the data of its inputs: these alone are parsed at once then."""

MAX_PARAMETERS = 256
"""Parameters of a request."""

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
_WINDOW = 4 * 1024
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


def decompress(body: bytes, encoding: str | None, limit: int, hold: Hold = unlimited) -> bytes:
    """Undo a Content-Encoding while never holding much more than ``limit`` bytes of the result.

    Args:
        body: The body as received.
        encoding: ``gzip`` (of one or more members), ``deflate`` (the zlib format), or ``identity``, which None means.
        limit: The most bytes that the result may have.
        hold: Told of the result's bytes as they come, if they are not the body's own.

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
        return _inflate(body, _WBITS[coding], limit, hold, streams=1 if coding == "deflate" else _MAX_GZIP_MEMBERS)
    except zlib.error as error:
        raise ProtocolError(f"the body is not valid {coding}: {error}") from None


def _inflate(body: bytes, wbits: int, limit: int, hold: Hold, streams: int) -> bytes:
    """Decompress a body made of at most that many streams; small windows, as zlib copies what follows a stream."""
    view, position, output = memoryview(body), 0, bytearray()
    for _ in range(streams):
        stream = zlib.decompressobj(wbits)
        while not stream.eof:
            window = view[position : position + _WINDOW]
            if not window:
                raise ProtocolError("the compressed body is truncated")
            part = stream.decompress(window, limit + 1 - len(output))
            hold(len(part))
            output += part
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

    In long JSON an input's data may be left as the :class:`ArrayText` that it is.

    Raises:
        ProtocolError: They are not JSON, or nested too deeply, or too long beside the data of inputs.
    """
    if size <= MAX_WHOLE:
        try:
            request = orjson.loads(memoryview(body)[:size])
        except orjson.JSONDecodeError as error:
            if body.find(b"NaN", 0, size) < 0 and body.find(b"Infinity", 0, size) < 0:
                raise _no_json(error) from None
        else:
            _check_members(body, size, request)
            return request
    return _load_in_parts(body, size)


def _load_in_parts(body: bytes, size: int) -> object:
    try:
        rest, arrays = cut_arrays(body, size, MAX_REST)
        request = orjson.loads(rest)
        _check_members(rest, len(rest), request)
        inputs = request.get("inputs") if isinstance(request, dict) else None
        for entry in inputs if isinstance(inputs, list) else ():
            mark = entry.get("data") if isinstance(entry, dict) else None
            if isinstance(mark, str) and (array := arrays.pop(mark, None)) is not None:
                entry["data"] = array if len(array) > PIECE else array.whole()
    except TooLongError:
        text = f"the request's JSON has more than {MAX_REST} bytes beside arrays of numbers as the data of inputs"
        raise ProtocolError(text, "too_large", status=413) from None
    except ValueError as error:
        raise _no_json(error) from None
    if arrays:
        raise ProtocolError("the request has members called data that are no input's")
    return request


def _no_json(error: ValueError) -> ProtocolError:
    return ProtocolError(f"the request is not valid JSON: {explained(error)}")


def _check_members(text: bytes, size: int, request: object) -> None:
    """Refuse a request in which an object has a member twice, of which the parser has kept the last."""
    try:
        name = None if surely_unique(text, size, request) else duplicate(text, size)
    except ValueError as error:
        raise _no_json(error) from None
    if name is not None:
        raise ProtocolError(f"the member {shown(name)} stands twice in one object of the request: send it once")


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
