"""The end of connections that are encrypted, each of which the client would have to agree to."""

from __future__ import annotations

import functools
import json
import select
import socket
import ssl
import subprocess
import time
from asyncio import constants
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest
import torch
import uvicorn
from serving import loaded, wait_until
from torch import nn

from guardserve.runtime import Runtime
from guardserve.service import leaving, throttle
from guardserve.service.app import Service, create_app
from guardserve.service.background import serve_in_background

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n"


class Copies(nn.Module):
    """Gives its input so many times, through a BatchNorm layer."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, and repeat."""
        y: torch.Tensor = self.bn(x)
        return y.repeat(1, self.copies)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, require_program: Callable[[str], str]) -> dict[str, Any]:
    """Make a certificate; return uvicorn's options for it."""
    folder: Path = tmp_path_factory.mktemp("tls")
    made = {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    out = ["-out", made["ssl_certfile"], "-keyout", made["ssl_keyfile"]]
    subprocess.run([require_program("openssl"), *request, *out], check=True, capture_output=True)
    return made


@contextmanager
def encrypted(files: dict[str, Any], copies: int = 1) -> Iterator[tuple[Service, Callable[..., ssl.SSLSocket]]]:
    """Serve a model over TLS; give the application, and what connects to it (until a stack ends)."""
    runtime = Runtime(loaded(Copies(copies)))
    app = create_app(runtime)
    context = ssl.create_default_context(cafile=files["ssl_certfile"])
    with (
        ExitStack() as own,
        mock.patch("guardserve.service.background.uvicorn.Config", functools.partial(uvicorn.Config, **files)),
    ):

        def connect(stack: ExitStack = own) -> ssl.SSLSocket:
            sock = stack.enter_context(socket.create_connection((url.hostname or "", url.port or 0), timeout=20))
            return stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))

        with serve_in_background(app) as address:
            url = urlsplit(address)
            wait_until(lambda: runtime.failure is None)
            yield app, connect


@pytest.mark.parametrize("asked", [LIVE + b"Connection: close\r\n\r\n", b"garbage\r\n\r\n"])
def test_a_client_that_does_not_agree_to_the_end_is_not_waited_for(asked: bytes, files: dict[str, Any]) -> None:
    """It has its answer, and a moment."""
    with encrypted(files) as (app, connect):
        sock = connect()
        sock.sendall(asked)
        assert sock.recv(2**16).startswith(b"HTTP/1.1 ")
        wait_until(lambda: not app.life.connections, timeout=10)


def test_a_server_that_stops_does_not_wait_for_clients_to_agree(files: dict[str, Any]) -> None:
    """One that has asked, and one that has not."""
    with encrypted(files) as (_, connect):
        sock, _silent = connect(), connect()
        sock.sendall(LIVE + b"\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
    assert time.monotonic() - began < 15


def last_words(sock: ssl.SSLSocket, said: bytes) -> bytes:
    """Say something over a connection like that one, end its side of TLS, and read what still comes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = sock.context.wrap_bio(incoming, outgoing, server_hostname="localhost")

    def exchange(step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:  # noqa: PERF203 - it is what steps wait by
                other.sendall(outgoing.read())
                incoming.write(other.recv(2**16))

    with socket.create_connection(sock.getpeername(), timeout=20) as other:
        exchange(tls.do_handshake)
        tls.write(said)
        other.sendall(outgoing.read())
        time.sleep(0.2)
        with suppress(ssl.SSLWantReadError):
            tls.unwrap()
        answer: bytes = exchange(lambda: tls.read(2**16))
        return answer


@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_a_refused_client_that_ends_its_side_is_answered_at_once(loop: str, files: dict[str, Any]) -> None:
    """However many wait for their turns before it: there is no later."""
    slow = mock.patch.multiple(throttle, INTERVAL=1000.0, CREDIT=0.0)
    with slow, encrypted({**files, "loop": loop}) as (app, connect):
        sock = connect()
        sock.sendall(LIVE + b"\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        for said in (b"garbage\r\n\r\n", LIVE):
            answer = last_words(sock, said)
            assert answer.startswith(b"HTTP/1.1 400")
            assert answer.count(b"HTTP/1.1") == 1
        wait_until(lambda: len(app.life.connections) <= 1, timeout=10)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_a_large_answer_that_is_taken_late_is_whole(
    loop: str, stops: bool, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later than a client has to agree to the end, also of a server that stops."""
    monkeypatch.setattr(leaving, "LINGER", 0.1)
    monkeypatch.setattr(constants, "SSL_SHUTDOWN_TIMEOUT", 0.5, raising=False)  # asyncio's own half minute
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: test\r\n%bContent-Length: %d\r\n\r\n"

    def read() -> bytes:
        time.sleep(2.0)
        received = b""
        while part := sock.recv(2**20):
            received += part
        return received

    with (
        ExitStack() as later,
        ThreadPoolExecutor() as pool,
        encrypted({**files, "loop": loop}, copies=1_000_000) as (_, connect),  # 30 MB
    ):
        sock = connect(later)  # the end of the answer may still be to read when the server has ended
        sock.sendall(head % (b"" if stops else b"Connection: close\r\n", len(body)) + body)
        select.select([sock], [], [], 20)
        reading = pool.submit(read)
        if not stops:
            reading.result()
    answered, _, content = reading.result().partition(b"\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 200")
    assert b"content-length: %d" % len(content) in answered.split(b"\r\n")
