"""A worker as its supervisor sees it."""

from __future__ import annotations

import logging
import signal
import socket
import struct
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from guardserve.workers.contents import Contents
from guardserve.workers.messages import Downward, Line, Report

_log = logging.getLogger(__name__)

STUCK = 5
"""Seconds that a worker may stop in the middle of a message; then its line is lost, and it is ended."""


class Worker:
    """One worker, and what is known of it.

    Args:
        number: Its number, from 1 on; a process that is started in the place of another has the same.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: SpawnProcess | None = None
        self.line: Line | None = None
        self.starts = 0
        self.report: Report | None = None
        self.fresh = False
        self.asked = 0
        self.silent_since: float | None = None
        self.up_since: float | None = None
        self.starts_at = 0.0
        self.deaths = 0
        self.reason: str | None = None
        self.lost = False
        self.anew = False
        self.loaded: Contents | None = None
        self.admitted = False
        self.held = False
        self.ending = False
        self.renewed = False
        self.outdated = False

    @property
    def answers(self) -> bool:
        """Whether what it has loaded is what clients are answered by, and is to be so on."""
        return self.admitted and not self.ending

    @property
    def up(self) -> bool:
        """Whether it takes connections."""
        return self.up_since is not None

    @property
    def age(self) -> float | None:
        """Seconds since it takes connections; None if it does not."""
        return None if self.up_since is None else time.monotonic() - self.up_since

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return None if self.process is None else self.process.pid

    @property
    def caught_up(self) -> bool:
        """Whether it has answered all that it was asked."""
        return self.asked == 0 or (self.report is not None and self.report.round == self.asked)

    def tell(self, message: Downward) -> bool:
        """Send it a message; False if it has ended, or takes none."""
        try:
            if self.line is not None:
                self.line.send(message)
                return True
        except BlockingIOError:
            self.end("takes no message")
        except OSError:
            pass  # it has ended, and its sentinel tells
        return False

    def end(self, reason: str) -> None:
        """End the process at once."""
        if self.process is not None:
            _log.error("worker %d %s: it is killed", self.number, reason)
            self.ending = True
            self.process.kill()

    def renew(self) -> None:
        """End the process, which has not answered anybody, to have another load what the files hold now."""
        if self.process is not None and not self.ending:
            _log.warning("worker %d starts anew, with what the files hold now", self.number)
            self.ending = self.renewed = True
            self.process.kill()

    def hang_up(self) -> None:
        """Close the line."""
        if self.line is not None:
            self.line.connection.close()
            self.line = None

    def forget(self) -> None:
        """Forget a process that has ended."""
        self.hang_up()
        self.process = self.report = self.up_since = self.silent_since = None
        self.loaded = None
        self.asked = 0
        self.admitted = self.held = self.ending = self.renewed = self.outdated = False


def limit(connection: Connection) -> None:
    """Let neither sending nor the rest of a message take for ever: a process may be stopped at any moment."""
    with socket.socket(fileno=connection.fileno()) as sock:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STUCK, 0))
        sock.detach()


def words(status: int | None) -> str:
    """Tell how a process ended."""
    if status is not None and status < 0:
        return f" by {signal.Signals(-status).name}"
    return "" if status is None else f" with status {status}"
