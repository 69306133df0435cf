"""The end of a server: a signal under load, and not one accepted request lost."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import TIMEOUT, free_port, is_ready, wait_until

PROGRAM = Path(sys.executable).with_name("guardserve")

MODEL = """
import time

import torch
from torch import nn

from guardserve import example_input


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        time.sleep(0.01)
        return self.bn(x)


@example_input(x=torch.zeros(1, 3))
def slow():
    return Slow()
"""

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}).encode()
INFER = "/v2/models/slow/infer"


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the command with a slow model until the block ends; give the process and its port once it is ready."""
    (folder / "slowmodel.py").write_text(MODEL)
    port = free_port()
    arguments = ["serve", "slowmodel:slow", "--port", str(port), "--log-level", "error", *options]
    process = subprocess.Popen([PROGRAM, *arguments], cwd=folder)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"))
        assert process.poll() is None
        yield process, port
    finally:
        process.kill()
        process.wait()


class Load:
    """Clients that send one request after the other until they are refused a connection.

    Args:
        port: Where to.
        keep_alive: Whether a client keeps its connection.
    """

    def __init__(self, port: int, *, keep_alive: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self._port = port
        self._keep_alive = keep_alive
        self._threads = [threading.Thread(target=self._run) for _ in range(6)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until every client has been refused."""
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()

    def _run(self) -> None:
        connection = None
        while True:
            if connection is None or connection.sock is None:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
                try:
                    connection.connect()
                except OSError:
                    return
            try:
                headers = {} if self._keep_alive else {"Connection": "close"}
                connection.request("POST", INFER, BODY, headers)
                answer = connection.getresponse()
                answer.read()
                self.outcomes[str(answer.status)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[f"lost: {type(error).__name__}"] += 1
                connection.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_request_and_ends_with_status_0(tmp_path: Path, signum: signal.Signals) -> None:
    """Clients with and without kept connections get an answer to everything until they are refused a connection."""
    with server(tmp_path, "--drain-delay", "0.5") as (process, port):
        loads = [Load(port, keep_alive=True), Load(port, keep_alive=False)]
        wait_until(lambda: all(load.outcomes["200"] > 20 for load in loads))
        process.send_signal(signum)
        assert process.wait(TIMEOUT) == 0
        for load in loads:
            load.join()
            assert set(load.outcomes) == {"200"}


def test_readiness_fails_at_once_while_requests_are_still_served(tmp_path: Path) -> None:
    """A load balancer has the drain delay to notice; kept connections work until their next answer closes them."""
    url = "http://127.0.0.1"
    with (
        server(tmp_path, "--drain-delay", "60") as (process, port),
        httpx.Client(base_url=f"{url}:{port}", trust_env=False, timeout=TIMEOUT) as client,
    ):
        process.terminate()
        wait_until(lambda: client.get("/v2/health/ready").status_code == 503, timeout=20)
        assert "stopping" in client.get("/v2/health/ready").json()["error"]
        assert client.get("/v2/health/live").status_code == 200
        answer = client.post(INFER, content=BODY)
        assert answer.status_code == 200
        assert answer.headers.get("connection") != "close"
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0


def test_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    """Whoever is in a hurry presses Ctrl-C again."""
    with server(tmp_path, "--drain-delay", "60") as (process, port):
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not is_ready(f"http://127.0.0.1:{port}"))
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_a_request_that_hangs_holds_the_end_up_only_so_long(tmp_path: Path) -> None:
    """A body that never comes is given up after the shutdown timeout."""
    with (
        server(tmp_path, "--drain-delay", "0", "--shutdown-timeout", "1") as (process, port),
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.2)
        process.terminate()
        assert process.wait(10) == 0
