"""Servers stop to listen without losing whom they have taken."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from guardserve.service.listening import stop_listening


class Greeting(asyncio.Protocol):
    """Says one word, and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say it."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


async def greeted(turns: int) -> bytes:
    """Connect, let so many turns of the loop pass, stop listening, and return what the client hears to the end."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Greeting, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname(), timeout=10) as client:
        for _ in range(turns):
            await asyncio.sleep(0)
        await stop_listening([server])
        assert not server.is_serving()
        with suppress(ConnectionResetError):  # nobody had taken it
            return await loop.run_in_executor(None, client.recv, 5)
        return b"reset"


def test_who_was_taken_is_served_whenever_the_server_is_closed() -> None:
    """Every client hears something: also one that was taken in the turn before."""
    heard = [asyncio.run(greeted(turns)) for turns in range(8)]
    assert set(heard) <= {b"hello", b"reset"}
    assert heard[-1] == b"hello"
