"""What workers of a test run: as little as may be, so that they start at once."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path


def silent_then_broken(connection: Connection, sockets: object, up: bytes, starts: Path) -> None:
    """Say once to be up and then nothing any more; the next times, end at once.

    Args:
        connection: The line to the supervisor.
        sockets: Not used.
        up: What to say.
        starts: File of one character for each start.
    """
    del sockets
    if not _is_first(starts):
        raise SystemExit(3)
    connection.send_bytes(up)
    time.sleep(60)


def up_then_gone(connection: Connection, sockets: object, up: bytes, starts: Path) -> None:
    """Say once to be up and end; the next times, end at once.

    Args:
        connection: The line to the supervisor.
        sockets: Not used.
        up: What to say.
        starts: File of one character for each start.
    """
    del sockets
    if _is_first(starts):
        connection.send_bytes(up)
    raise SystemExit(3)


def _is_first(starts: Path) -> bool:
    """Note a start, and tell whether there was none before."""
    with starts.open("a") as file:
        file.write(".")
    return len(starts.read_text()) == 1
