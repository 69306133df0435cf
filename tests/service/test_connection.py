"""The short way of plain inference requests, past ASGI: what takes it, what must not, and that nobody can tell."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO
from unittest import mock

import httpx
import pytest
import torch
import uvicorn
from serving import loaded, metric, serving, wait_until
from torch import nn

from guardserve.runtime import Runtime
from guardserve.service import delivery, inference, leaving, reading
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.connection import PATIENCE, Connection
from guardserve.service.gateway import Gateway
from guardserve.service.limits import Limits
from guardserve.service.request import SMALL
from guardserve.signature import TensorSpec

INFER = "/v2/models/net/infer"

OWN = {"date": "", "x-request-id": ""}
"""Headers in which no two answers are alike."""


class Echo(nn.Module):
    """Gives its input back, through a BatchNorm layer; waits at a gate for inputs that begin with 77."""

    def __init__(self, copies: int = 1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, eps=0)
        self.open = threading.Event()
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, when the gate is open."""
        if (x[:, 0] == 77).any():
            self.open.wait(30)
        y: torch.Tensor = self.bn(x)
        return y.repeat(1, self.copies)


@pytest.fixture
def short() -> Iterator[mock.Mock]:
    """Count the requests that take the short way."""
    with mock.patch.object(Gateway, "begin", autospec=True, side_effect=Gateway.begin) as begin:
        yield begin


def request(first: float, *headers: str, path: str = INFER, version: str = "1.1") -> bytes:
    """Write a request of one row as it goes over the wire."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1.0, 2.0]}
    content = json.dumps({"inputs": [tensor]}).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: test", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def send_for_ever(connection: Wire, part: bytes) -> None:
    """Send far more than the kernel's buffers hold."""
    for _ in range(2**29 // len(part)):
        connection.socket.sendall(part)


@contextmanager
def connected(client: httpx.Client) -> Iterator[Wire]:
    """Connect to a client's server without any HTTP."""
    address = client.base_url.host, client.base_url.port or 80
    with socket.create_connection(address, timeout=20) as sock, sock.makefile("rb") as file:
        yield Wire(sock, file)


class Wire:
    """A connection on which answers are read one by one."""

    def __init__(self, sock: socket.socket, file: BinaryIO) -> None:
        self.socket = sock
        self.file = file

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers, body."""
        status = int(self.file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return status, headers, self.file.read(int(headers.get("content-length", 0)))

    def first(self) -> float:
        """Read one answer, which must be good: the first number of its output."""
        status, _, body = self.answer()
        assert status == 200, body
        number: float = json.loads(body)["outputs"][0]["data"][0]
        return number


def test_a_plain_request_goes_past_asgi_and_is_answered_as_if_it_had_not(
    short: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same status, headers and body, for good requests and for bad ones, each counted once."""
    monkeypatch.setattr("guardserve.service.connection.PATIENCE", 20.0)  # the client sends headers and body apart
    runtime = Runtime(loaded(Echo()))
    app = create_app(runtime)
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [0.5, 1, 2]}
    bodies = [{"id": "a", "inputs": [tensor]}, {"inputs": []}, {"inputs": [tensor], "outputs": [{"name": "no"}]}]
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: runtime.failure is None)
        short_way = [client.post(INFER, json=body) for body in bodies]
        assert short.call_count == len(bodies)
        with mock.patch("guardserve.service.app.Service.shortcut", return_value=None):
            long_way = [client.post(INFER, json=body) for body in bodies]
        assert short.call_count == len(bodies)
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 2
        assert metric(client, 'guardserve_requests_total{model="net",status="400"}') == 4
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0
    assert [a.status_code for a in short_way] == [200, 400, 400]
    for a, b in zip(short_way, long_way, strict=True):
        assert (a.status_code, a.content) == (b.status_code, b.content)
        assert {**a.headers, **OWN} == {**b.headers, **OWN}


def test_what_is_not_plain_takes_the_long_way(short: mock.Mock) -> None:
    """A body that comes late, one that is compressed or large, one that waits for a word first, and other paths."""
    with serving(Echo()) as client, connected(client) as connection:
        whole = request(3)
        connection.socket.sendall(whole[:-5])
        time.sleep(20 * PATIENCE)
        connection.socket.sendall(whole[-5:])
        assert connection.first() == 3
        head, _, content = request(4, "Expect: 100-continue").partition(b"\r\n\r\n")
        connection.socket.sendall(head + b"\r\n\r\n")
        assert connection.answer()[0] == 100
        connection.socket.sendall(content)
        assert connection.first() == 4
        connection.socket.sendall(request(4, path="/v2/models/other/infer"))
        assert connection.answer()[0] == 404
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [5, 1, 2]}
        assert client.post(INFER, json={"inputs": [tensor], "id": "x" * SMALL}).status_code == 200
        assert short.call_count == 0
        connection.socket.sendall(request(6))
        assert connection.first() == 6
        assert short.call_count == 1


def test_headers_that_are_those_of_the_last_request_are_not_parsed_again(short: mock.Mock) -> None:
    """Each body, id and answer is its own all the same, also with others between them, behind them or in parts."""
    parsing = mock.patch.object(
        Connection, "on_headers_complete", autospec=True, side_effect=Connection.on_headers_complete
    )
    with parsing as parsed, serving(Echo()) as client, connected(client) as wire:
        ids, before = [], parsed.call_count
        for number in (1.0, 2.0, 3.0):
            wire.socket.sendall(request(number))
            status, headers, body = wire.answer()
            assert (status, json.loads(body)["outputs"][0]["data"]) == (200, [number, 1.0, 2.0])
            ids.append(headers["x-request-id"])
        assert len(set(ids)) == 3
        assert parsed.call_count == before + 1
        wire.socket.sendall(request(4.0, "X-Request-Id: mine"))
        assert wire.answer()[1]["x-request-id"] == "mine"
        wire.socket.sendall(request(5.0))
        assert wire.first() == 5.0
        wire.socket.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        assert wire.answer()[0] == 200
        wire.socket.sendall(request(6.0) + request(7.0) + request(8.0))
        assert [wire.first() for _ in range(3)] == [6.0, 7.0, 8.0]
        whole, before = request(9.0), parsed.call_count
        wire.socket.sendall(whole[:-30])
        wait_until(lambda: parsed.call_count > before)
        wire.socket.sendall(whole[-30:])
        assert wire.first() == 9.0
        wire.socket.sendall(request(1.5).replace(b'"FP32"', b'"FP3\r"'))
        assert wire.answer()[0] == 400
        wire.socket.sendall(request(2.5))
        assert wire.first() == 2.5
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 10
    assert short.call_count >= 8


def test_a_connection_on_which_nothing_comes_is_ended_however_many_requests_it_had() -> None:
    """So long after the last answer, and not before."""
    app = create_app(Runtime(loaded(Echo())))
    config = functools.partial(uvicorn.Config, timeout_keep_alive=1)
    with (
        mock.patch("guardserve.service.background.uvicorn.Config", config),
        serve_in_background(app) as address,
        httpx.Client(base_url=address, trust_env=False) as client,
    ):
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        with connected(client) as wire:
            for number in range(4):
                time.sleep(0.4 if number else 0)
                wire.socket.sendall(request(float(number)))
                answered = time.monotonic()
                assert wire.first() == number
            assert wire.file.read() == b""
            assert time.monotonic() - answered > 0.9


def test_a_known_request_that_is_not_plain_any_more_takes_the_long_way() -> None:
    """As one does while the server stops, when each answer ends its connection."""
    app = create_app(Runtime(loaded(Echo())))
    with serve_in_background(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        with connected(client) as wire:
            for number in (1.0, 2.0):
                wire.socket.sendall(request(number))
                assert wire.first() == number
            app.life.close()
            wire.socket.sendall(request(3.0))
            status, headers, _ = wire.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert wire.file.read() == b""


def test_pipelined_requests_are_answered_in_their_order() -> None:
    """The second while the first is worked on, and many at once."""
    model = Echo()
    with serving(model) as client, connected(client) as connection:
        connection.socket.sendall(request(77) + request(1))
        connection.socket.sendall(b"".join(request(n) for n in range(2, 60)))
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 0
        model.open.set()
        assert [connection.first() for _ in range(60)] == [77, *range(1, 60)]


def test_what_is_pipelined_behind_the_last_answer_is_not_begun() -> None:
    """The last answer says that it is the last; what was sent behind it the client may send again (RFC 9112, 9.6)."""
    model = Echo()
    app = create_app(Runtime(loaded(model)))
    forwards = 'guardserve_forward_duration_seconds_count{model="net"}'
    with serve_in_background(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        before = metric(client, forwards)
        with connected(client) as wire:
            wire.socket.sendall(request(77))
            wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 1)
            app.life.close()
            wire.socket.sendall(request(1) + request(2))
            model.open.set()
            closing = [wire.answer()[1].get("connection")]
            if closing == [None]:  # the end began behind it
                closing.append(wire.answer()[1].get("connection"))
            assert closing[-1] == "close"
            assert wire.file.read() == b""
        assert metric(client, forwards) == before + len(closing)
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == len(closing)


def test_a_client_that_goes_away_between_headers_and_body_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the body is waited for the short way."""
    monkeypatch.setattr("guardserve.service.connection.PATIENCE", 20.0)
    with serving(Echo()) as client:
        with connected(client) as connection:
            connection.socket.sendall(request(1).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
            time.sleep(0.1)
            connection.file.close()
        errors = 'guardserve_request_errors_total{model="net",reason="disconnected"}'
        wait_until(lambda: metric(client, errors) == 1)
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


@pytest.mark.parametrize(("version", "headers"), [("1.1", ("Connection: close",)), ("1.0", ())])
def test_a_connection_ends_with_an_answer_where_the_client_says_so(version: str, headers: tuple[str, ...]) -> None:
    """Asked for by a header, or by the protocol of old."""
    with serving(Echo()) as client, connected(client) as connection:
        connection.socket.sendall(request(1, *headers, version=version))
        status, answered, _ = connection.answer()
        assert (status, answered["connection"]) == (200, "close")
        assert connection.socket.recv(1) == b""


@pytest.mark.parametrize("pause", [0.0, 4 * PATIENCE], ids=["short way", "long way"])
def test_the_last_answer_is_whole_whatever_is_sent_behind_it(pause: float) -> None:
    """Input that nobody reads would have the kernel take back what the client has not yet received."""
    with (
        mock.patch.object(leaving, "LINGER", 20.0),  # however busy the client is
        serving(Echo(copies=200_000)) as client,  # 2.4 MB
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        sock.settimeout(20)
        sock.connect((client.base_url.host, client.base_url.port))
        head, _, body = request(1, "Connection: close").partition(b"\r\n\r\n")
        sock.sendall(head + b"\r\n\r\n")
        time.sleep(pause)
        sock.sendall(body + request(2) * 2_000)
        time.sleep(0.2)
        with sock.makefile("rb") as file:
            status, headers, body = Wire(sock, file).answer()
            assert (status, headers["connection"], len(body)) == (200, "close", int(headers["content-length"]))
            assert file.read() == b"", "it ends in order"
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 1


def test_an_answer_that_is_taken_late_is_whole_whatever_was_sent_behind_it() -> None:
    """Later than what is sent behind it is read for, once it is taken."""
    with (
        mock.patch.object(leaving, "LINGER", 0.1),
        serving(Echo(copies=200_000)) as client,  # 2.4 MB
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        sock.settimeout(20)
        sock.connect((client.base_url.host, client.base_url.port))
        sock.sendall(request(1, "Connection: close"))
        wait_until(lambda: metric(client, 'guardserve_requests_total{model="net",status="200"}') == 1)
        for _ in range(10):
            time.sleep(0.1)
            sock.sendall(request(2))
        with sock.makefile("rb") as file:
            status, headers, body = Wire(sock, file).answer()
            assert (status, headers["connection"], len(body)) == (200, "close", int(headers["content-length"]))
            assert file.read() == b"", "it ends in order"


def test_a_client_that_sends_on_behind_its_last_answer_is_let_go() -> None:
    """What it sends is read for a while only; one that sends nothing, and does not close, is not kept either."""
    app = create_app(Runtime(loaded(Echo())))
    with (
        serve_in_background(app) as address,
        httpx.Client(base_url=address, trust_env=False) as client,
        connected(client) as busy,
        connected(client) as silent,
    ):
        for wire in (busy, silent):
            wire.socket.sendall(request(1, "Connection: close"))
            assert wire.answer()[1]["connection"] == "close"
            assert wire.file.read() == b""
        with pytest.raises(ConnectionError):
            send_for_ever(busy, request(1))
        wait_until(lambda: not app.life.connections)


def test_the_body_of_a_request_that_was_answered_early_is_read_on_before_the_connection_ends() -> None:
    """As long as where the connection goes on, however short the time that others have."""
    with (
        mock.patch.object(leaving, "LINGER", 0.0),
        serving(Echo(), max_body_size=1000) as client,
        connected(client) as connection,
    ):
        head = f"POST {INFER} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {2**20}\r\n\r\n"
        connection.socket.sendall(head.encode())
        time.sleep(0.2)
        connection.socket.sendall(b"x" * 2**20)
        status, headers, _ = connection.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert connection.file.read() == b""


def test_a_large_answer_is_written_aside_and_sent_whole(short: mock.Mock) -> None:
    """Larger than what is written on the event loop; the connection goes on."""
    with serving(Echo(copies=50_000)) as client, connected(client) as connection:
        for first in (1, 2):
            connection.socket.sendall(request(first))
            _, _, body = connection.answer()
            output = json.loads(body)["outputs"][0]
            assert output["shape"] == [1, 150_000]
            assert output["data"] == [first, 1, 2] * 50_000
        assert short.call_count == 2


def test_a_client_that_does_not_read_is_not_written_to_without_end() -> None:
    """What waits to be sent is bounded: its further requests wait, and others are served."""
    with serving(Echo(copies=5_000)) as client, connected(client) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.socket.settimeout(3)  # for each part: nobody takes any for so long
        with pytest.raises(TimeoutError):
            send_for_ever(connection, request(1) * 1_000)
        answered = metric(client, 'guardserve_requests_total{model="net",status="200"}')
        assert 0 < answered < 10_000
        assert client.get("/v2/health/ready").status_code == 200


def test_a_client_that_takes_no_answer_is_let_go() -> None:
    """Its connection ends, as what it asked for would wait for ever; one that takes some, slowly, is kept."""
    with (
        mock.patch.object(delivery, "WRITE_TIMEOUT", 1.5),
        serving(Echo(copies=500_000)) as client,  # 6 MB
        connected(client) as slow,
        connected(client) as idle,
    ):
        for each in (slow, idle):
            each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
            each.socket.sendall(request(1))
        answer = slow.file.readline()
        while not answer.endswith(b"}"):
            time.sleep(0.1)
            part = slow.file.read(2**18)
            assert part, "the slow client was let go"
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert idle.socket.recv(1)
        with pytest.raises(ConnectionError):
            send_for_ever(idle, request(1))


def test_what_comes_at_once_with_the_last_request_is_passed_over() -> None:
    """It is read with that, and neither answered nor counted, whatever it is."""
    refused = b"POST /v2/models/net/infer HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    with serving(Echo()) as client:
        for behind in (refused, request(1), b"GET /v2/health/live HTTP/1.0\r\n\r\n", b"garbage\r\n\r\n"):
            with connected(client) as connection:
                connection.socket.sendall(refused + behind)
                assert connection.file.read().count(b"HTTP/1.1 ") == 1
        assert metric(client, 'guardserve_requests_total{model="net",status="400"}') == 4
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 0
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


def test_a_client_that_leaves_the_end_of_its_answers_is_let_go() -> None:
    """However little is left of them: nothing else would ever end its connection."""
    transports: list[asyncio.Transport] = []
    made, end, lost = Connection.connection_made, Connection.connection_lost, threading.Event()

    def lose(connection: Connection, error: Exception | None) -> None:
        end(connection, error)
        lost.set()

    def narrow(connection: Connection, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
        transports.append(transport)
        made(connection, transport)

    with (
        mock.patch.object(delivery, "WRITE_TIMEOUT", 0.3),
        mock.patch.object(Connection, "connection_made", narrow),
        mock.patch.object(Connection, "connection_lost", lose),
        serving(Echo(copies=500)) as client,
        connected(client) as connection,
    ):
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        wait_until(lambda: len(transports) == 1)
        for _ in range(2_000):
            connection.socket.sendall(request(1))
            time.sleep(0.005)
            if transports[0].get_write_buffer_size():
                break
        assert 0 < transports[0].get_write_buffer_size() < transports[0].get_write_buffer_limits()[1]
        assert lost.wait(10)


def test_pipelined_requests_are_read_as_they_are_answered() -> None:
    """Each waits in memory only once those before it are nearly answered: no client can fill it."""
    begin = Connection.on_message_begin
    with (
        mock.patch.object(Connection, "on_message_begin", autospec=True, side_effect=begin) as begun,
        serving(Echo()) as client,
        connected(client) as connection,
    ):

        def send() -> None:
            with suppress(OSError):  # in the end nobody takes them
                connection.socket.sendall(request(1) * 30_000)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(200):
            assert connection.first() == 1
        assert 200 <= begun.call_count < 200 + 2 * 2**18 / len(request(1))
        connection.socket.shutdown(socket.SHUT_RDWR)
        sender.join(20)


def test_an_answer_for_a_client_that_has_gone_is_nobodys() -> None:
    """When a client goes, uvicorn tells that to the last of its pipelined requests alone; the others answer still."""
    transport = mock.Mock()
    outlet = leaving.Outlet(transport, transport.close)
    for gone in (False, True):
        transport.is_closing.return_value = gone
        outlet.write(b"an answer")
    transport.write.assert_called_once_with(b"an answer")


def test_middleware_around_the_application_sees_every_request(short: mock.Mock) -> None:
    """With something between the server and the service, nothing goes past it."""
    runtime = Runtime(loaded(Echo(), TensorSpec("x", torch.float32, (-1, 3))))
    app = create_app(runtime, limits=Limits(max_batch_size=8))
    seen = []

    async def middleware(scope: dict[str, object], receive: object, send: object) -> None:
        seen.append(scope.get("path"))
        await app(scope, receive, send)  # type: ignore[arg-type]

    middleware.life = app.life  # type: ignore[attr-defined]
    with (
        serve_in_background(middleware) as url,  # type: ignore[arg-type]
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        wait_until(lambda: runtime.failure is None)
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [5, 1, 2]}
        assert client.post(INFER, json={"inputs": [tensor]}).status_code == 200
    assert INFER in seen
    assert short.call_count == 0


def test_a_fault_in_the_short_way_is_500_and_counted(short: mock.Mock) -> None:
    """Whether it happens before the forward or after, the client is answered and the connection goes on."""
    with serving(Echo()) as client, connected(client) as connection:
        for owner, where in ((reading.Reading, "read"), (inference.Inference, "_write")):
            with mock.patch.object(owner, where, side_effect=KeyError("a secret")):
                connection.socket.sendall(request(1))
                status, _, body = connection.answer()
                assert status == 500
                assert b"secret" not in body
            connection.socket.sendall(request(2))
            assert connection.first() == 2
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="internal"}') == 2
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0
    assert short.call_count == 4
