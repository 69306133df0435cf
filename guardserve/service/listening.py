"""How servers stop to listen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


async def stop_listening(servers: Iterable[asyncio.Server]) -> None:
    """Close servers, and keep every connection that they have taken.

    asyncio takes a connection in one turn of the loop and gives it to its server in the next. If that has been closed
    in between, the connection is neither answered nor closed: its client would wait until this process ends.
    """
    closing = list(servers)
    loop = asyncio.get_running_loop()
    for server in closing:
        for sock in server.sockets:
            loop.remove_reader(sock.fileno())
    await asyncio.sleep(0)
    for server in closing:
        server.close()
    await asyncio.sleep(0)
