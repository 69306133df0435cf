"""Log lines: each one a JSON object that says what the record did."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from serving import free_port, is_ready, wait_until

from guardserve.logs import LINES, JsonFormatter, configure_logs


def written(message: str, *values: object, **given: Any) -> dict[str, Any]:
    """Log something; read the line."""
    logger, stream = logging.getLogger("guardserve.test"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    try:
        logger.warning(message, *values, **given)
    finally:
        logger.removeHandler(handler)
    (line,) = stream.getvalue().splitlines()
    read: dict[str, Any] = json.loads(line)
    return read


def test_a_line_has_the_time_the_level_the_logger_and_the_message() -> None:
    """The time is of now, in UTC."""
    line = written("%s is %d", "one", 1)
    at = datetime.fromisoformat(line.pop("time").replace("Z", "+00:00"))
    assert abs(datetime.now(timezone.utc) - at) < timedelta(minutes=1)
    assert line == {"level": "warning", "logger": "guardserve.test", "message": "one is 1"}


def test_what_is_given_besides_is_kept_whatever_it_is() -> None:
    """Numbers stay numbers, and an object that JSON does not know is its text."""
    line = written("x", extra={"request_id": "a1", "rows": 3, "path": Path("model.pt2"), "share": float("nan")})
    assert (line["request_id"], line["rows"], line["path"], line["share"]) == ("a1", 3, "model.pt2", None)


def test_an_exception_is_one_line_too() -> None:
    """Its traceback is a field."""
    line = written("failed", exc_info=ValueError("first\nsecond"))
    assert "ValueError: first\nsecond" in line["exception"]


def garbage(port: int) -> bool:
    """Send what is no HTTP; tell whether it was refused."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"garbage\r\n\r\n")
        return b" 400 " in sock.recv(2**16)


def test_clients_do_not_fill_the_log() -> None:
    """What each of them can have written again and again is written some times a second, and then with a count."""
    port = free_port()
    program = Path(sys.executable).with_name("guardserve")
    command = [str(program), "serve", "demo", "--port", str(port), "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    sent, text = 0, "Invalid HTTP request received."
    try:
        wait_until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"))
        began = time.monotonic()
        while sent < 10 * LINES or time.monotonic() < began + 1.5:
            assert garbage(port)
            sent += 1
        seconds = time.monotonic() - began
        time.sleep(1.1)
        assert garbage(port)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    lines = [line for line in map(json.loads, errors.splitlines()) if line["message"].startswith(text)]
    assert len(lines) <= LINES * (seconds + 2) + 1
    assert len(lines) + sum(line.get("left_out", 0) for line in lines) == sent + 1
    assert lines[-1]["message"] == f"{text} (and {lines[-1]['left_out']} before it, which were not told)"


def test_lines_that_differ_are_all_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come at once: as where each of a model's layers is told of."""
    with monkeypatch.context() as patched:
        patched.setattr(logging.getLogger(), "handlers", [])
        stream = io.StringIO()
        patched.setattr(sys, "stderr", stream)
        configure_logs("warning", "text")
        for n in range(5 * LINES):
            logging.getLogger("guardserve.test").warning("layer %d", n)
            logging.getLogger("guardserve.test").warning("the same")
        written = stream.getvalue().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in written if "layer" in line] == [str(n) for n in range(5 * LINES)]
    assert LINES <= sum("the same" in line for line in written) <= 2 * LINES


def test_the_server_writes_nothing_else() -> None:
    """From its start to its end every line is JSON, uvicorn's too; the alarm of the model's readiness is an event."""
    port = free_port()
    program = Path(sys.executable).with_name("guardserve")
    command = [str(program), "serve", "demo", "--port", str(port), "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"))
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert {"guardserve.watch", "uvicorn.error"} <= {line["logger"] for line in lines}
    assert next(line["message"] for line in lines if line.get("event") == "ready") == "digits_cnn: ready"
