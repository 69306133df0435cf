"""The life of the server: it serves, then drains, then closes."""

from __future__ import annotations

from starlette.types import Message, Send

CLOSE = (b"connection", b"close")


class Life:
    """Where the server stands.

    Attributes:
        draining: It is about to stop: readiness says no, and requests are served as before.
        closing: It takes no more connections, and closes each that it has after its next answer.
    """

    def __init__(self) -> None:
        self.draining = False
        self.closing = False

    def drain(self) -> None:
        """Begin to stop."""
        self.draining = True

    def close(self) -> None:
        """Take no more connections."""
        self.draining = self.closing = True


def closing(send: Send) -> Send:
    """Have an answer close its connection."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
        await send(message)

    return wrapped
