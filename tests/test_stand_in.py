"""Whoever connects while no worker takes connections is told so at once."""

from __future__ import annotations

import math
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from idle_workers import up_once
from serving import wait_until
from starlette.types import ASGIApp

from guardserve.exceptions import GuardserveError
from guardserve.service.access import Access
from guardserve.workers import Pool, StandIn, Supervisor, bind
from guardserve.workers import supervisor as supervisor_module
from guardserve.workers.messages import Up

KEY = "a-key-of-an-operator"


def configured(app: ASGIApp) -> uvicorn.Config:
    """Configure uvicorn as the command does."""
    return uvicorn.Config(app, log_config=None, access_log=False)


@contextmanager
def standing_in(access: Access | None = None) -> Iterator[tuple[StandIn, str]]:
    """Give one that does not answer yet, for a socket on which somebody listens, and the URL."""
    (sock,) = bind("127.0.0.1", 0)
    sock.listen()
    stand_in = StandIn(access or Access(), [sock], configured, 100)
    with sock:
        try:
            yield stand_in, f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            stand_in.close()


def test_what_has_connected_and_what_connects_is_told_when_to_come_again() -> None:
    """The server is alive, and not ready, for health, inference and metrics alike; a body is taken before."""
    with standing_in() as (stand_in, url), httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        address = (httpx.URL(url).host, httpx.URL(url).port)
        with socket.create_connection(address, timeout=30) as waiting:
            waiting.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            until = time.monotonic() + 100
            stand_in.begin(until)
            said = b"".join(iter(lambda: waiting.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 503 ")
        for method, path in (("GET", "/v2/health/ready"), ("POST", "/v2/models/net/infer"), ("GET", "/metrics")):
            most = math.ceil(until - time.monotonic())
            answer = client.request(method, path, content=bytes(2**22) if method == "POST" else None)
            assert answer.status_code == 503
            assert math.ceil(until - time.monotonic()) <= int(answer.headers["retry-after"]) <= most
            assert "no worker takes connections" in answer.json()["error"]
            assert answer.headers["x-request-id"]
        assert stand_in.refused == 1
        client.post("/v2/models/net/versions/1/infer")
        client.get("/v2/models/net/infer")
        client.post("/v2/repository/models/net/load")
        assert stand_in.refused == 2, "only inference requests count"
        assert client.get("/v2/health/live").status_code == 200


def test_who_has_no_key_is_told_nothing() -> None:
    """The answer is the one that workers would give."""
    with standing_in(Access([KEY], protect_health=True)) as (stand_in, url):
        stand_in.begin(0.0)
        for path in ("/v2/health/live", "/v2/models/net"):
            assert httpx.get(url + path, trust_env=False).status_code == 401
        known = httpx.get(f"{url}/v2/models/net", trust_env=False, headers={"Authorization": f"Bearer {KEY}"})
        assert (known.status_code, known.headers["retry-after"]) == (503, "1")


def test_it_leaves_what_connects_to_the_workers_as_often_as_they_are_back() -> None:
    """It takes no connection then, and those that it has taken have their answers."""
    with standing_in() as (stand_in, url):
        address = (httpx.URL(url).host, httpx.URL(url).port)
        for _ in range(3):
            stand_in.begin(0.0)
            with socket.create_connection(address, timeout=30) as early:
                wait_until(lambda: stand_in._state.connections)
                stand_in.end()
                wait_until(lambda: not stand_in._servers)
                with socket.create_connection(address, timeout=30) as late:
                    time.sleep(0.1)
                    taken, peer = stand_in._sockets[0].accept()
                    taken.close()
                    assert peer == late.getsockname()
                early.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert early.recv(13) == b"HTTP/1.1 503 "
            wait_until(lambda: not stand_in._state.connections)


def test_who_has_not_said_all_has_an_answer_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing is left of its request that would fill the log."""
    with standing_in() as (stand_in, url):
        stand_in.begin(0.0)
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
            wait_until(lambda: stand_in._readings)
            caplog.clear()
            stand_in.close()
            assert client.recv(13) == b"HTTP/1.1 503 "
    assert not caplog.text


def test_who_is_just_being_taken_when_it_ends_is_not_left_hanging() -> None:
    """Its connection is the kernel's already, and not yet the server's."""
    for _ in range(30):
        with standing_in() as (stand_in, url), ExitStack() as stack:
            stand_in.begin(0.0)
            wait_until(lambda: stand_in._servers)
            address = (httpx.URL(url).host, httpx.URL(url).port)
            clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)]
            stand_in.close()
            stand_in._sockets[0].close()
            for client in clients:
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""


def test_a_supervisor_without_workers_has_clients_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment when the last has died until another is up, or none can be started and it gives up."""
    for name, value in {"ATTEMPTS": 2, "BACKOFF": 0.5}.items():
        monkeypatch.setattr(supervisor_module, name, value)
    seen: set[tuple[int, int]] = set()
    with standing_in() as (stand_in, url):
        host, port = httpx.URL(url).host, httpx.URL(url).port
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                with suppress(httpx.TransportError), httpx.Client(base_url=url, trust_env=False, timeout=2) as client:
                    seen.add((client.get("/v2/health/ready").status_code, client.get("/v2/health/live").status_code))

        sockets = list(stand_in._sockets)
        arguments = (pickle.dumps(Up()), tmp_path / "starts", 0.0)
        supervisor = Supervisor(
            up_once, arguments, sockets=sockets, workers=1, pool=Pool(), timeout=1, stand_in=stand_in
        )
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            with pytest.raises(GuardserveError, match="worker 1 ended with status 3"):
                supervisor.run()
        finally:
            ended.set()
            asking.join()
        assert seen == {(503, 200)}
        assert stand_in._thread is None
        with socket.create_connection((host, port or 0), timeout=5):
            assert not stand_in.active
