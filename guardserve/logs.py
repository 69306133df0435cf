"""Log lines for people, or for machines: one JSON object each."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from datetime import datetime, timezone
from typing import Literal

import orjson

from guardserve.identity import current

LogFormat = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

LINES = 10
"""Lines a second of one kind: an overloaded server has better things to do. What is left out is counted."""

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""What every record has; anything else was given by whoever logged it."""


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON.

    It has ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, whatever was given as ``extra``, such as
    ``model`` or ``event``, and an exception's traceback as ``exception``. A line that belongs to a request has its ids:
    ``request_id``, and where they are known ``trace_id`` and ``protocol_id``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        identity = current()
        if identity is not None:
            line |= identity.labels()
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class Quota:
    """Says which lines are written: so many a second of a kind.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = 0
        self._written: Counter[Hashable] = Counter()
        self._left_out: Counter[Hashable] = Counter()

    def take(self, kind: Hashable) -> int | None:
        """Return how many of a kind were left out since one was written; None if the next is left out, too."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._written.clear()
        if self._written[kind] >= LINES:
            self._left_out[kind] += 1
            return None
        self._written[kind] += 1
        return self._left_out.pop(kind, 0)


def untold(left_out: int) -> str:
    """Return what a line ends with that so many of its kind were left out before."""
    return f" (and {left_out} before it, which were not told)" if left_out else ""


class Repetitions(logging.Filter):
    """Leaves lines out that say the same as others of that second, as what any client can send is told of in some."""

    def __init__(self) -> None:
        super().__init__()
        self._quota = Quota()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is written."""
        message = record.getMessage()
        left_out = self._quota.take((record.name, message))
        if left_out:
            record.msg, record.args, record.left_out = message + untold(left_out), (), left_out
        return left_out is not None


def configure_logs(level: str, style: LogFormat) -> None:
    """Have every logger of this process write to standard error, and repeat itself some times a second at most.

    Args:
        level: Least severe level that is written, such as ``"info"``.
        style: ``"text"`` or ``"json"``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(TEXT))
    handler.addFilter(Repetitions())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
