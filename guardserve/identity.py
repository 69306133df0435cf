"""Whose request it is: the ids that its answer, its log lines and its exemplars have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import NamedTuple

REQUEST_ID = b"x-request-id"

MAX_LENGTH = 64
"""Characters of an id: what is longer is not taken, or, of the protocol's own, cut."""

_GIVEN = re.compile(rb"[!#-\[\]-~]{1,%d}" % MAX_LENGTH)
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class Identity:
    """The ids of one request.

    Attributes:
        request_id: The client's ``X-Request-Id`` if that is printable ASCII without spaces, quotation marks and
            backslashes, which Prometheus 2 does not read, of at most :data:`MAX_LENGTH` characters; else the trace's
            id; else one made for it.
        trace_id: The id in its ``traceparent`` (W3C Trace Context); None without a valid one.
        protocol_id: What the Open Inference Protocol calls the request's id; None before it is read, or without one.
    """

    __slots__ = ("protocol_id", "request_id", "trace_id")

    def __init__(self, headers: Mapping[bytes, bytes]) -> None:
        """Take the ids from a request's headers by their lower-case names."""
        parent, given = headers.get(b"traceparent"), headers.get(REQUEST_ID)
        trace = None if parent is None else _TRACEPARENT.fullmatch(parent)
        self.trace_id = None if trace is None else trace[1].decode()
        if given is not None and _GIVEN.fullmatch(given):
            self.request_id = given.decode()
        else:
            self.request_id = self.trace_id or os.urandom(16).hex()
        self.protocol_id: str | None = None

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The header of the answer."""
        return REQUEST_ID, self.request_id.encode()

    def labels(self) -> dict[str, str]:
        """Return the ids that are known, by name."""
        ids = (("trace_id", self.trace_id), ("request_id", self.request_id), ("protocol_id", self.protocol_id))
        return {name: value for name, value in ids if value is not None}


class Exemplar(NamedTuple):
    """One request that stands for many.

    Attributes:
        identity: Whose it is.
        value: What it added to a number.
        at: When, in seconds since the epoch.
    """

    identity: Identity
    value: float
    at: float


_current: ContextVar[Identity | None] = ContextVar("guardserve_request", default=None)


def current() -> Identity | None:
    """Return whose request is being worked on here; None outside of any."""
    return _current.get()


class identified:  # noqa: N801 - it reads as a verb, and as a class it takes half the time of a generator
    """Say whose request it is that the block works on, to whatever it calls.

    Args:
        identity: Whose; None for nobody's.
    """

    __slots__ = ("_identity", "_token")

    def __init__(self, identity: Identity | None) -> None:
        self._identity = identity

    def __enter__(self) -> None:
        self._token = _current.set(self._identity)

    def __exit__(self, *exc_info: object) -> None:
        _current.reset(self._token)
