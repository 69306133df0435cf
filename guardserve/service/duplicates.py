"""Members that stand twice in one object of a request's JSON, of which the parser silently keeps the last."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from guardserve.service.array_text import DEEP, cut_arrays


class _DuplicateError(Exception):
    """A member stands twice."""


def surely_unique(text: bytes, size: int, request: Any) -> bool:
    """Tell whether no member stands twice in an object of a request, as far as its colons do.

    There are more in its text than it has members if one stands there twice, if one is in a string, or if an object is
    where the protocol has none. To look for them costs less than to parse in another way.

    Args:
        text: What it was parsed from.
        size: Bytes of that.
        request: What came of it.
    """
    try:
        members = len(request) + _size(request.get("parameters"))
        for entry in (*(request.get("inputs") or ()), *(request.get("outputs") or ())):
            members += _size(entry) + _size(entry.get("parameters"))
    except (AttributeError, TypeError):
        return False
    return text.count(b":", 0, size) <= members


def duplicate(text: bytes, size: int) -> str | None:
    """Return a member that stands twice in one object; None if there is none.

    Args:
        text: Begins with JSON that has been parsed.
        size: Bytes of that.

    Raises:
        ValueError: It is nested deeper than Python goes.
    """
    rest, _ = cut_arrays(text, size, sys.maxsize)
    try:
        _DECODER.decode(rest.decode())
    except _DuplicateError as error:
        return str(error)
    except RecursionError:
        raise ValueError(DEEP) from None
    return None


def _size(value: object) -> int:
    return len(value) if isinstance(value, dict) else 0


def _check(members: Sequence[tuple[str, object]]) -> None:
    """Look at the members of one object; what becomes of it is no matter."""
    seen = set()
    for name, _ in members:
        if name in seen:
            raise _DuplicateError(name)
        seen.add(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_check, parse_int=len, parse_float=len)
