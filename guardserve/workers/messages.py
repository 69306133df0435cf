"""What workers and their supervisor say to each other, over a line that only they have."""

from __future__ import annotations

import pickle  # nosec B403
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from guardserve.monitor import Detection, Seen, Summary
from guardserve.workers.contents import Contents
from guardserve.workers.families import Families


@dataclass(frozen=True)
class Ready:
    """The model of a worker has passed its probe; the worker takes connections when it is told to.

    Attributes:
        loaded: What the worker runs.
    """

    loaded: Contents


@dataclass(frozen=True)
class Listen:
    """A worker is to take connections."""


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
        summaries: What its samples since its last report show, by each version that had any, with a reference profile.
    """

    round: int | None
    families: Families
    version: str = ""
    window: list[tuple[float, int]] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    summaries: Sequence[Summary] = ()


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


@dataclass(frozen=True)
class Reload:
    """A worker was asked to have all load their model again.

    Attributes:
        ticket: To be given back.
    """

    ticket: int


@dataclass(frozen=True)
class Prepare:
    """A worker is to load its model again, and to go on with the version that it has.

    Attributes:
        number: To be given back.
    """

    number: int


@dataclass(frozen=True)
class Prepared:
    """A worker has loaded its model again, or could not.

    Attributes:
        number: That of the :class:`Prepare`.
        loaded: What makes up the new version.
        failure: Why there is none.
    """

    number: int
    loaded: Contents = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class Decide:
    """A worker that has loaded its model again is to let the new version answer, or to drop it.

    Attributes:
        number: To be given back.
        commit: Which of them.
    """

    number: int
    commit: bool


@dataclass(frozen=True)
class Decided:
    """A worker has done so.

    Attributes:
        number: That of the :class:`Decide`.
        loaded: What it runs now.
    """

    number: int
    loaded: Contents


@dataclass(frozen=True)
class Outcome:
    """What came of loading the model again.

    Attributes:
        ticket: That of the :class:`Reload`.
        failure: Why no worker has another version now; None if all have.
        running: Whether that is as it was being loaded already.
    """

    ticket: int
    failure: str | None = None
    running: bool = False


Upward: TypeAlias = Ready | Up | Failed | Report | Scrape | Reload | Prepared | Decided
"""What a worker says."""

Downward: TypeAlias = Listen | Collect | Pooled | Hurry | Prepare | Decide | Outcome
"""What the supervisor says."""


class Line:
    """One end of the line between a worker and its supervisor; any thread may send.

    Args:
        connection: The end.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, message: Upward | Downward) -> None:
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
