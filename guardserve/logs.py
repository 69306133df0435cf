"""Log lines for people, or for machines: one JSON object each."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Literal

import orjson

from guardserve.identity import current

LogFormat = Literal["text", "json"]

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

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


def configure_logs(level: str, style: LogFormat) -> None:
    """Have every logger of this process write to standard error.

    Args:
        level: Least severe level that is written, such as ``"info"``.
        style: ``"text"`` or ``"json"``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
