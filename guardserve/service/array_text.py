"""Long arrays in the JSON of a request, read piece by piece.

A parser that reads all at once takes up to thirty times the memory of the text, and keeps every other thread of the
process waiting until it has ended: a body of 65 KB that says 16 million times NaN in gzip did so for seconds.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

PIECE = 64 * 1024
"""Bytes that are parsed at once; no number with the whitespace around it is longer."""

DEEP = "it is nested too deeply, or ends in the midst of that: send data flat, or nested like its shape"
"""What is wrong with JSON that no tensor needs."""

_TOO_DEEP = ("depth limit exceeded", "failed to allocate memory")  # as orjson calls it
_START = re.compile(rb"[ \t\n\r]*:[ \t\n\r]*\[")  # of an array, behind its name
_NAME = b'"data"'
_SPACE = b" \t\n\r"
_VALUES = bytes(byte for byte in range(256) if byte not in b"[],")
_KINDS = bytes(byte if byte in b"[]," else ord("0") for byte in range(256))
_MARK = secrets.token_hex(8)


class ArrayText:
    """A JSON array of numbers, or of arrays of them, as it was written.

    Args:
        body: What holds it.
        start: Where its bracket opens.
        end: Behind where that closes.
    """

    __slots__ = ("_body", "_end", "_start")

    def __init__(self, body: bytes, start: int, end: int) -> None:
        self._body = body
        self._start = start
        self._end = end

    def __len__(self) -> int:
        """Return its bytes."""
        return self._end - self._start

    @property
    def has_booleans(self) -> bool:
        """Whether true or false stands in it, or what begins like that."""
        return self._body.find(b"t", self._start, self._end) >= 0 or self._body.find(b"f", self._start, self._end) >= 0

    def whole(self) -> list[Any]:
        """Parse it at once.

        Raises:
            ValueError: It is no JSON, but for the literals NaN, Infinity and -Infinity.
        """
        return parse_numbers(self._body[self._start : self._end])

    def lists(self, shape: Sequence[int]) -> Iterator[list[Any]]:
        """Yield the values that stand in it, flat or nested like ``shape``, some at a time.

        Args:
            shape: Sizes, all above 0.

        Raises:
            ValueError: It is no such array, or no JSON.
        """
        first = re.compile(rb"[ \t\n\r]*").match(self._body, self._start + 1)
        if first is None or self._body[first.end() : first.end() + 1] != b"[":
            for piece in self._pieces():
                yield _values(piece)
            return
        misfit = f"nested data is not made of lists like shape {list(shape)}"
        if _length(shape) > len(self):
            raise ValueError(misfit)
        expected, position = _outline(shape), 0
        for piece in self._pieces():
            brackets = piece.translate(None, _VALUES) + b","
            if expected[position : position + len(brackets)] != brackets or not _outside(piece):
                raise ValueError(misfit)
            position += len(brackets)
            yield _values(piece.replace(b"[", b" ").replace(b"]", b" "))
        if position != len(expected):
            raise ValueError(misfit)

    def _pieces(self) -> Iterator[bytes]:
        """Yield what is between the outer brackets, cut at commas."""
        position, end = self._start + 1, self._end - 1
        while True:
            cut = end if end - position <= PIECE else self._body.rfind(b",", position, position + PIECE)
            if cut < 0:
                raise ValueError(f"a number is longer than {PIECE} bytes")
            yield self._body[position:cut]
            if cut == end:
                return
            position = cut + 1


class TooLongError(ValueError):
    """There is too much beside the arrays."""


def cut_arrays(body: bytes, size: int, most: int) -> tuple[bytes, dict[str, ArrayText]]:
    """Cut the arrays out that are the value of a member called data and hold neither strings nor objects.

    Args:
        body: Begins with JSON, perhaps.
        size: Bytes of that.
        most: Bytes that there may be beside the arrays.

    Returns:
        The rest, with a string in the place of each array, and the arrays by these strings. If the rest is JSON, and
        each array as well, so are the first ``size`` bytes.

    Raises:
        TooLongError: There are more.
    """
    rest: list[bytes] = []
    arrays: dict[str, ArrayText] = {}
    done = position = 0
    while (position := body.find(_NAME, position, size)) >= 0:
        position += len(_NAME)
        opening = _START.match(body, position, size)
        end = None if opening is None else _end(body, opening.end(), size)
        if opening is not None and end is not None:
            mark = f"{_MARK}{len(arrays)}"
            start = opening.end() - 1
            most -= start - done + len(mark)
            if most < 0:
                raise TooLongError
            arrays[mark] = ArrayText(body, start, end)
            rest += [body[done:start], b'"%b"' % mark.encode()]
            done = position = end
        elif position - done > most:
            raise TooLongError
    if size - done > most:
        raise TooLongError
    rest.append(body[done:size])
    return b"".join(rest), arrays


def parse_numbers(text: bytes) -> list[Any]:
    """Parse an array, in which NaN, Infinity and -Infinity may stand.

    Raises:
        ValueError: It is none.
    """
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if b"N" not in text and b"I" not in text:
            raise explained(error) from None
        try:
            values = json.loads(text, parse_float=finite)
        except RecursionError:
            raise ValueError(DEEP) from None
    found: list[Any] = values
    return found


def explained(error: ValueError) -> ValueError:
    """Return what the parser found: of text that ends deep inside lists it says that its memory did not suffice."""
    if isinstance(error, orjson.JSONDecodeError) and error.msg in _TOO_DEEP:
        return ValueError(f"{DEEP}: line {error.lineno} column {error.colno} (char {error.pos})")
    return error


def finite(literal: str) -> float:
    """Convert a decimal, refusing one so large that Python would make it infinite."""
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"the number {literal[:30]} is too large")
    return value


def _values(piece: bytes) -> list[Any]:
    values = parse_numbers(b"[%b]" % piece)
    if not values:
        raise ValueError("there is no value beside a comma")
    return values


def _outside(piece: bytes) -> bool:
    """Tell whether no value stands before an opening bracket, or behind a closing one, as if it were inside."""
    kinds = piece.translate(_KINDS, _SPACE)
    return b"0[" not in kinds and b"]0" not in kinds


def _end(body: bytes, start: int, size: int) -> int | None:
    """Return where an array ends that holds neither strings nor objects; None if it is not followed as one may be."""
    quote = body.find(b'"', start, size)
    brace = body.find(b"}", start, quote if quote >= 0 else size)
    if brace < 0 and quote < 0:
        return None
    end = _stripped(body, start, brace if brace >= 0 else quote)
    if brace < 0:  # another member follows
        if body[end - 1 : end] != b",":
            return None
        end = _stripped(body, start, end - 1)
    if end <= start or body[end - 1 : end] != b"]":
        return None
    # an array of lists that a string follows within it ends later
    return end if body.count(b"]", start, end) == body.count(b"[", start, end) + 1 else None


def _stripped(body: bytes, start: int, end: int) -> int:
    """Return where whitespace begins that ends a part of a body."""
    window = body[max(start, end - PIECE) : end]
    return end - len(window) + len(window.rstrip(_SPACE))


def _length(shape: Sequence[int]) -> int:
    """Return the bytes of :func:`_outline`."""
    length = shape[-1] - 1
    for size in reversed(shape[:-1]):
        length = size * (length + 3) - 1
    return length + 1


def _outline(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of nested data without the outermost brackets, and a comma behind."""
    outline = b"," * (shape[-1] - 1)
    for size in reversed(shape[:-1]):
        outline = b",".join([b"[%b]" % outline] * size)
    return outline + b","
