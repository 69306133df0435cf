"""Answers to inference requests, and what each failure is to a client."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from starlette.types import Message, Send

from guardserve.engine import DeviceError, ForwardTimeoutError, OutOfMemoryError, QueueFullError
from guardserve.exceptions import InputError, ModelOutputError, NonFiniteOutputError, TrainingModeError
from guardserve.identity import Identity
from guardserve.service.body import ProtocolError

_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

CLIENT_CLOSED_REQUEST = 499
"""Counted for a client that went away before its answer; nobody is left to receive it."""

RETRY_AFTER: Headers = ((b"retry-after", b"1"),)
"""Sent with what a moment may cure."""


REFUSAL = "guardserve_refusal"
"""Key in a request's state of what was answered when its body could not be read."""


class Answer(NamedTuple):
    """An answer ready to be sent.

    Attributes:
        status: HTTP status.
        body: Its bytes.
        headers: HTTP headers, without the length.
        reason: One of :data:`guardserve.metrics.REASONS` for a failure.
    """

    status: int
    body: bytes
    headers: Headers
    reason: str | None = None

    def named(self, identity: Identity) -> Answer:
        """Return it with the id of its request."""
        return Answer(self.status, self.body, [*self.headers, identity.header], self.reason)

    async def send(self, send: Send) -> None:
        """Send it."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def named(send: Send, identity: Identity) -> Send:
    """Have an answer sent with the id of its request."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), identity.header]}
        await send(message)

    return wrapped


def headed(send: Send) -> Send:
    """Have no more than the head of an answer sent."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return wrapped


def refusal(status: int, reason: str, error: str, headers: Headers = ()) -> Answer:
    """Return a failure in the protocol's form."""
    body = orjson.dumps({"error": error})
    return Answer(status, body, [(b"content-type", b"application/json"), *headers], reason)


INTERNAL = refusal(500, "internal", "internal error; the server's log has the details")
"""What a fault of the server's own is to a client."""

_STATUSES: tuple[tuple[type[BaseException], int, str, Headers], ...] = (
    (InputError, 400, "invalid_input", ()),
    (NonFiniteOutputError, 500, "nonfinite_output", ()),
    (ModelOutputError, 500, "model_error", ()),
    (TrainingModeError, 500, "model_error", ()),
    (QueueFullError, 503, "overloaded", RETRY_AFTER),
    (OutOfMemoryError, 503, "out_of_memory", RETRY_AFTER),
    (ForwardTimeoutError, 504, "timeout", ()),
    (DeviceError, 500, "model_error", ()),
)


def failure(error: BaseException, model: str) -> Answer:
    """Say to a client what became of a request that failed."""
    if isinstance(error, ProtocolError):
        return refusal(error.status, error.reason, str(error))
    for kind, status, reason, headers in _STATUSES:
        if isinstance(error, kind):
            what = "the model gave a non-finite output: " if kind is NonFiniteOutputError else ""
            return refusal(status, reason, f"{what}{error}", headers)
    # its message may hold what a client should not see: paths, weights, other clients' data
    _log.error("the forward of %s failed", model, exc_info=error)
    text = f"the model raised {type(error).__name__} on this input; the server's log has the details"
    return refusal(500, "model_error", text)
