"""The service in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from guardserve.exceptions import GuardserveError
from guardserve.service.app import Service
from guardserve.service.server import Companion, Server

START_TIMEOUT = 60.0


@contextmanager
def serve_in_background(
    app: Service, host: str = "127.0.0.1", port: int = 0, companion: Companion | None = None
) -> Iterator[str]:
    """Run an application under uvicorn until the block ends.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        companion: Another server of the application, to run beside it.

    Yields:
        The server's URL, once it accepts connections; the model may still be on its start-up probe.

    Raises:
        GuardserveError: If the server does not start.
    """
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, proxy_headers=False)
    server = Server(config, app.life, companion=companion)
    thread = threading.Thread(target=server.run, name="guardserve-server")
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise GuardserveError(
                    f"the server did not start on {host}:{port}: is the port taken? Port 0 takes a free one"
                )
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
