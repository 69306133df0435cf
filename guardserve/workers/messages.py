"""What workers and their supervisor say to each other, over a line that only they have."""

from __future__ import annotations

import pickle  # nosec B403
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from guardserve.monitor import Detection, Seen, Summary
from guardserve.workers.families import Families


@dataclass(frozen=True)
class Up:
    """A worker takes connections."""


@dataclass(frozen=True)
class Failed:
    """A worker does not start.

    Attributes:
        reason: Why, in one line.
    """

    reason: str


@dataclass(frozen=True)
class Collect:
    """A worker is to report.

    Attributes:
        round: To be given back.
        since: What its monitor's window saw before is of no interest, by the clock of all processes.
    """

    round: int
    since: float


@dataclass(frozen=True)
class Report:
    """What one worker has counted and seen.

    Attributes:
        round: That of the :class:`Collect` which asked for it; None for a last word.
        families: Its metrics.
        version: Which model it serves, by its fingerprint.
        window: When each part of its monitor's window ended, and how many samples that has.
        seen: What these parts show together, without those that ended before ``since``.
        summary: What its samples since its last report show, if it has a reference profile and there were any.
    """

    round: int | None
    families: Families
    version: str = ""
    window: list[tuple[float, int]] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    summary: Summary | None = None


@dataclass(frozen=True)
class Scrape:
    """A worker has to show all workers' metrics.

    Attributes:
        ticket: To be given back.
    """

    ticket: int


@dataclass(frozen=True)
class Pooled:
    """What all workers have counted and seen.

    Attributes:
        ticket: That of the :class:`Scrape` which asked for it.
        families: Their metrics.
        version: The fingerprint of the model that this worker has said it serves.
        seen: What the windows of those that serve it show together.
        detection: What a detector of all their samples makes of them, with a reference profile.
    """

    ticket: int
    families: Families
    version: str
    seen: Seen
    detection: Detection | None


@dataclass(frozen=True)
class Hurry:
    """A worker that drains is to wait for nobody new."""


Message: TypeAlias = Up | Failed | Collect | Report | Scrape | Pooled | Hurry


class Line:
    """One end of the line between a worker and its supervisor; any thread may send.

    Args:
        connection: The end.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: If the other side has gone, or takes nothing.
        """
        # not Connection.send: torch would have it share tensors by open files
        data = pickle.dumps(message)
        with self._sending:
            self.connection.send_bytes(data)

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EOFError: If the other side has gone.
            OSError: If it stopped in the middle of one.
        """
        # from a process of ours, on a line that has no name
        return pickle.loads(self.connection.recv_bytes())  # noqa: S301 # nosec B301
