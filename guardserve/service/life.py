"""The life of the server: it serves, then drains, then closes."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import Message, Send

CLOSE = (b"connection", b"close")


class Life:
    """Where the server stands.

    Args:
        max_connections: How many there may be.
        unreadable: Told of each request that cannot be read.

    Attributes:
        connections: Those that there are, once it listens.
        draining: It is about to stop: readiness says no, and requests are served as before.
        closing: It takes no more connections, and closes each that it has after its next answer.
    """

    def __init__(self, max_connections: int = 1024, unreadable: Callable[[], object] = bool) -> None:
        self.max_connections = max_connections
        self.unreadable = unreadable
        self.connections: Collection[object] = ()
        self.draining = False
        self.closing = False

    @property
    def crowded(self) -> bool:
        """Whether there are more connections than there may be."""
        return len(self.connections) > self.max_connections

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
