"""What workers of a test run: as little as may be, so that they start at once."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path


def up_once(connection: Connection, sockets: object, up: bytes, starts: Path, seconds: float) -> None:
    """Say once to be up, and nothing any more until the end; the next times, end at once.

    Args:
        connection: The line to the supervisor.
        sockets: Not used.
        up: What to say.
        starts: File of one character for each start.
        seconds: Until the first end.
    """
    del sockets
    with starts.open("a") as file:
        file.write(".")
    if len(starts.read_text()) == 1:
        connection.send_bytes(up)
        time.sleep(seconds)
    raise SystemExit(3)
