"""Clients that send no body, too many headers, no HTTP, or wish for another protocol: each is told, and none stays."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from unittest import mock

import httpx
import pytest
import torch
from serving import metric, serving, wait_until
from torch import nn

from guardserve.engine import Result
from guardserve.service import bounds
from guardserve.service.answer import Answer
from guardserve.service.connection import Connection
from guardserve.service.heads import MAX_HEAD
from guardserve.service.inference import Inference
from guardserve.service.request import InferRequest

INFER = "/v2/models/net/infer"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n"
POST = f"POST {INFER} HTTP/1.1\r\nHost: test\r\n".encode()


class Waits(nn.Module):
    """Gives its input back through a BatchNorm layer, for inputs that begin with 77 after a second."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, eps=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        time.sleep(1.0 if (x[:, 0] == 77).any() else 0.0)
        y: torch.Tensor = self.bn(x)
        return y


def content(first: float = 0.0) -> bytes:
    """Write the body of a request of one row."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1.0, 2.0]}
    return json.dumps({"inputs": [tensor]}).encode()


def request(*headers: bytes, body: bytes | None = None) -> bytes:
    """Write a request as it goes over the wire."""
    body = content() if body is None else body
    return POST + b"\r\n".join([*headers, b"Content-Length: %d" % len(body), b"", body])


@contextmanager
def raw(client: httpx.Client) -> Iterator[socket.socket]:
    """Connect to a client's server without any HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as sock:
        yield sock


def send_for_ever(sock: socket.socket) -> None:
    """Send far more than is read before the connection is closed."""
    for _ in range(2**14):
        sock.sendall(b"a" * 2**20)


def read_all(sock: socket.socket) -> bytes:
    """Read until the server closes the connection, which it must do in time."""
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


def refused(received: bytes, status: int) -> str:
    """Return the error of an answer that is the protocol's, has an id, and ends its connection."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.lower().splitlines()
    assert lines[0].startswith(b"http/1.1 %d " % status)
    assert {b"content-type: application/json", b"connection: close", b"content-length: %d" % len(body)} <= set(lines)
    assert any(line.startswith(b"x-request-id: ") for line in lines)
    error: str = json.loads(body)["error"]
    return error


@pytest.mark.parametrize("header", [b"Content-Length: 10", b"Transfer-Encoding: chunked"])
def test_a_body_of_which_nothing_comes_is_waited_for_as_long_as_one_that_stops(header: bytes) -> None:
    """408, and the connection is closed."""
    with serving(Waits(), body_timeout=0.3) as client, raw(client) as sock:
        sock.sendall(POST + header + b"\r\n\r\n")
        assert "took longer than 0.3 s" in refused(read_all(sock), 408)
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


def test_a_server_that_stops_does_not_wait_for_a_body_of_which_nothing_has_come() -> None:
    """It has not been accepted; one that has begun to come is."""
    with serving(Waits()) as client, raw(client) as bare, raw(client) as begun:
        bare.sendall(POST + b"Content-Length: 10\r\n\r\n")
        whole = request()
        begun.sendall(whole[:-5])
        wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 2)
        stopped = time.monotonic()
        begun.sendall(whole[-5:])
        assert begun.recv(1000).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - stopped < 20


def test_a_server_that_stops_does_not_wait_long_for_bodies_whose_requests_were_refused() -> None:
    """Nor for those that are refused while it stops: a client may send on for ever, or say nothing more."""
    shutdown, stopping = Connection.shutdown, threading.Event()

    def stop(each: Connection) -> None:
        shutdown(each)
        stopping.set()

    def refuse_late(sock: socket.socket) -> None:
        stopping.wait(30)
        sock.sendall(b"%x\r\n%b\r\n" % (500, b"x" * 500))

    with ExitStack() as open_until_the_end, mock.patch.object(bounds, "HEADER_TIMEOUT", 60.0):
        with (
            mock.patch.object(Connection, "shutdown", stop),
            ThreadPoolExecutor(1) as thread,
            serving(Waits(), max_body_size=1000) as client,
        ):
            early, late = (open_until_the_end.enter_context(raw(client)) for _ in range(2))
            early.sendall(POST + b"Connection: close\r\nContent-Length: 99999999\r\n\r\n")
            assert "larger than 1000 bytes" in refused(read_all(early), 413)
            late.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (900, b"x" * 900))
            wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 1)
            sent = thread.submit(refuse_late, late)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 30
        assert sent.exception() is None
        assert "larger than 1000 bytes" in refused(read_all(late), 413)


def test_a_client_that_has_gone_before_its_last_answer_is_closed_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel then knows of no connection whose end could be told; that is no fault of the server's."""
    made, end, lost = Connection.connection_made, Connection.connection_lost, threading.Event()

    def make(each: Connection, transport: asyncio.Transport) -> None:
        gone = mock.Mock(wraps=transport, **{"write_eof.side_effect": OSError(errno.ENOTCONN, "not connected")})
        made(each, gone)

    def lose(each: Connection, error: Exception | None) -> None:
        end(each, error)
        lost.set()

    with (
        serving(Waits()) as client,
        mock.patch.object(Connection, "connection_made", make),
        mock.patch.object(Connection, "connection_lost", lose),
        raw(client) as sock,
    ):
        sock.sendall(request(b"Connection: close"))
        assert lost.wait(10)
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("rest", [b"x", b"x" * 1000, b"\r\n"])
@pytest.mark.parametrize("head", [LIVE + b"Content-Length: 1000\r\n\r\n", POST + b"Content-Length: 99999999\r\n\r\n"])
def test_what_comes_after_an_early_answer_keeps_no_connection_open(
    head: bytes, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the body, all of it, or something between requests."""
    monkeypatch.setattr(bounds, "HEADER_TIMEOUT", 0.6)
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(head)
        answer = HTTPResponse(sock)
        answer.begin()
        answer.read()
        sock.sendall(rest)
        assert read_all(sock) == b""


def test_a_body_that_comes_after_its_answer_in_time_harms_no_request_behind_it() -> None:
    """It is read and dropped."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(LIVE + b"Content-Length: 1000\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        sock.sendall(b"x" * 1000 + request(b"Connection: close"))
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_requests_that_wait_for_the_model_are_not_ended_for_the_one_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the server that does not read on: a part of a request's headers may lie there for long."""
    monkeypatch.setattr(bounds, "HEADER_TIMEOUT", 0.6)
    with serving(Waits()) as client, raw(client) as sock:
        last = request(b"Connection: close")
        sock.sendall(request(body=content(77)) + request() + last[:30])
        first = sock.recv(1000)
        sock.sendall(last[30:])
        assert (first + read_all(sock)).count(b"HTTP/1.1 200") == 3


LARGE = [
    LIVE + b"X: " + b"a" * MAX_HEAD + b"\r\n\r\n",
    LIVE + b"X: y\r\n" * (MAX_HEAD // 2) + b"\r\n",
    b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: test\r\n\r\n",
]


@pytest.mark.parametrize("head", LARGE)
@pytest.mark.parametrize("size", [2**20, 1000])
def test_a_head_that_is_too_large_is_refused(head: bytes, size: int) -> None:
    """By one header, by many, or by the path, whether it comes at once or in parts; others are served."""
    with serving(Waits()) as client, raw(client) as sock:
        for start in range(0, len(head), size):
            sock.sendall(head[start : start + size])
        assert str(MAX_HEAD) in refused(read_all(sock), 431)
        with raw(client) as other:
            other.sendall(LIVE + b"Connection: close\r\nX: " + b"a" * (MAX_HEAD - 200) + b"\r\n\r\n")
            assert read_all(other).startswith(b"HTTP/1.1 200")


ENDLESS = [
    LIVE + b"X: ",
    POST + b"Transfer-Encoding: chunked\r\n\r\n1;",
    POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ",
]


@pytest.mark.parametrize("start", ENDLESS, ids=["header", "chunk extension", "trailer"])
def test_what_never_ends_is_not_read_for_ever(start: bytes) -> None:
    """The connection is closed long before it has taken much."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(start)
        with pytest.raises(ConnectionError):
            send_for_ever(sock)
        assert client.get("/v2/health/live").status_code == 200


def test_a_request_that_asks_for_another_protocol_is_answered_in_this_one() -> None:
    """As ``curl --http2`` does, with a body, in parts too, with another behind it; h2c or one that nobody knows."""
    upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    unknown = (b"Connection: close, Upgrade", b"Upgrade: websocket")
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(request(*upgrade))
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        whole = request(*upgrade)
        sock.sendall(whole[:-20])
        time.sleep(0.1)
        sock.sendall(whole[-20:] + request(*upgrade) + request() + request(*unknown))
        assert read_all(sock).count(b"HTTP/1.1 200") == 4


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / SMTP/9\r\n\r\n",
        b"GET / HTTP/1.10\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_protocols_form(garbage: bytes) -> None:
    """At the start, and after a request: that is answered first, and alone."""
    with serving(Waits()) as client, raw(client) as first, raw(client) as second:
        first.sendall(garbage)
        assert "not an HTTP request" in refused(read_all(first), 400)
        second.sendall(request(body=content(77)) + garbage)
        assert [line for line in read_all(second).splitlines() if line.startswith(b"HTTP")] == [b"HTTP/1.1 200 OK"]
        assert metric(client, 'guardserve_unreadable_requests_total{model="net"}') == 2
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 1


@pytest.mark.parametrize(
    "hosts",
    [b"", b"Host: a\r\nHost: a\r\n", b"Host: a, b\r\nhost:\r\n", b"Host: a b\r\n", b"Host: a/b\r\n"],
)
def test_a_request_without_exactly_one_host_is_refused(hosts: bytes) -> None:
    """On every path, as RFC 9112 (3.2) demands, at first and behind good ones."""
    end = hosts + b"Content-Length: %d\r\n\r\n%b" % (len(content()), content())
    with serving(Waits()) as client:
        for line in (f"POST {INFER}", "GET /v2/health/live", "GET /metrics", "GET /none"):
            with raw(client) as first, raw(client) as later:
                first.sendall(line.encode() + b" HTTP/1.1\r\n" + end)
                assert "one Host header" in refused(read_all(first), 400)
                for _ in range(2):
                    later.sendall(request())
                    assert later.recv(2**16).startswith(b"HTTP/1.1 200")
                later.sendall(line.encode() + b" HTTP/1.1\r\n" + end)
                assert "one Host header" in refused(read_all(later), 400)
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == 8


@pytest.mark.parametrize("header", [b"Content-Type: a/b\r\n", b"content-encoding: gzip\r\n"])
def test_a_header_that_says_how_to_read_a_body_stands_once(header: bytes) -> None:
    """None of two is silently taken for the one that counts."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(LIVE + header + b"\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        sock.sendall(LIVE + header + header + b"\r\n")
        assert "may stand once" in refused(read_all(sock), 400)


def test_a_request_with_any_host_is_answered() -> None:
    """The server has no name of its own; in HTTP/1.0 there need not be one."""
    live = b"GET /v2/health/live HTTP/1."
    hosts = (b"", b" [::1]:80 ", b"a_b.example:", b"127.0.0.1:8000", b"[fe80::1%25eth0]")
    heads = [live + b"1\r\nConnection: close\r\nHost:%b\r\n\r\n" % host for host in hosts]
    with serving(Waits()) as client:
        for head in (*heads, live + b"0\r\n\r\n"):
            with raw(client) as sock:
                sock.sendall(head)
                assert read_all(sock).startswith(b"HTTP/1.1 200"), head


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"identity", b"chunked, identity", b"chunked\r\nTransfer-Encoding: gzip"]
)
def test_a_body_in_a_transfer_coding_that_nobody_undoes_is_refused(coding: bytes) -> None:
    """Chunked alone is one; it may be written in any case."""
    parts = b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(content()), content())
    with serving(Waits()) as client, raw(client) as sock, raw(client) as other:
        sock.sendall(POST + b"Transfer-Encoding: " + coding + parts)
        refused(read_all(sock), 400)
        other.sendall(POST + b"Connection: close\r\nTransfer-Encoding:  Chunked " + parts)
        assert read_all(other).startswith(b"HTTP/1.1 200")


def test_a_body_in_parts_that_are_none_is_refused() -> None:
    """While its request waits for it."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 1)
        sock.sendall(b"what\r\n")
        refused(read_all(sock), 400)
        wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 0)
        assert metric(client, 'guardserve_requests_total{model="net",status="400"}') == 1, "as it was answered"
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="malformed"}') == 1
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="disconnected"}') == 0


def test_a_refused_client_is_not_told_to_go_on() -> None:
    """Though it had asked whether it may; its request is counted as it was answered."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nwhat\r\n")
        refused(read_all(sock), 400)
        wait_until(lambda: metric(client, 'guardserve_requests_total{model="net",status="400"}') == 1)
        assert 'status="500"' not in client.get("/metrics").text


@pytest.mark.parametrize(
    "body", [content(), content(77), json.dumps({**json.loads(content()), "id": "x" * 2**18}).encode()]
)
def test_a_client_that_sends_no_more_has_its_answer(body: bytes) -> None:
    """As ``nc -N`` ends its side with its request: small, slow or large; then the connection ends."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(request(body=body))
        sock.shutdown(socket.SHUT_WR)
        received = read_all(sock)
        head = received.removeprefix(bounds.CONTINUE).lower()
        assert head.startswith(b"http/1.1 200")
        if body == content(77):  # others may be answered before it shows that no more comes
            assert b"\r\nconnection: close\r\n" in head
            assert received.startswith(bounds.CONTINUE), "whether it is still there"


def test_pipelined_requests_are_all_answered_to_a_client_that_sends_no_more() -> None:
    """And to one of the protocol of old, which knows no word before the answer."""
    with serving(Waits()) as client, raw(client) as sock, raw(client) as old:
        old.sendall(request(body=content(77)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        old.shutdown(socket.SHUT_WR)
        sock.sendall(request(body=content(77)) + request() * 20 + LIVE + b"\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).count(b"HTTP/1.1 200") == 22
        assert read_all(old).startswith(b"HTTP/1.1 200")


CHUNK = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"

CUT = [
    POST,
    POST + b"Content-Length: 10\r\n\r\n",
    request()[:-1],
    request(body=b" " * 2**18)[:-1],
    CHUNK,
    CHUNK + b"0\r\n",
    POST + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    LIVE,
]


@pytest.mark.parametrize("pause", [0.0, 0.2], ids=["at once", "later"])
@pytest.mark.parametrize("part", CUT)
def test_a_client_that_sends_no_more_in_the_middle_of_a_request_is_told(part: bytes, pause: float) -> None:
    """400 at once, as what is missing cannot come, and the connection ends; so does one on which nothing was asked."""
    with serving(Waits()) as client, raw(client) as sock, raw(client) as later, raw(client) as silent:
        silent.shutdown(socket.SHUT_WR)
        assert read_all(silent) == b""
        later.sendall(request())
        assert later.recv(2**16).startswith(b"HTTP/1.1 200")
        for each in (sock, later):
            each.sendall(part)
            time.sleep(pause)
            each.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            answer = read_all(each).removeprefix(bounds.CONTINUE)
            assert "in the middle of the request" in refused(answer, 400)
            assert time.monotonic() - began < 5
        wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 0)


def test_what_is_whole_before_a_request_that_is_cut_short_is_answered_alone() -> None:
    """As it is before anything else that cannot be read."""
    with serving(Waits()) as client, raw(client) as sock:
        sock.sendall(request(body=content(77)) + request()[:30])
        sock.shutdown(socket.SHUT_WR)
        assert [line for line in read_all(sock).splitlines() if line.startswith(b"HTTP/1.1 ")] == [
            b"HTTP/1.1 100 Continue",
            b"HTTP/1.1 200 OK",
        ]


@pytest.mark.parametrize("upgrade", [(), (b"Connection: Upgrade", b"Upgrade: h2c")], ids=["plain", "upgrade"])
@pytest.mark.parametrize("version", [b"1.2", b"1.9"])
def test_a_later_version_of_http_that_is_like_the_one_spoken_is_answered_as_if_it_were_that(
    version: bytes, upgrade: tuple[bytes, ...]
) -> None:
    """RFC 9110, 6.2: the connection stays, as in HTTP/1.1; it needs a host, and slow answers are told of."""
    later = request(*upgrade).replace(b"HTTP/1.1", b"HTTP/" + version, 1)
    with serving(Waits()) as client, raw(client) as sock, raw(client) as slow:
        for sent in (later, later, request(), later):
            sock.sendall(sent)
            head = sock.recv(2**16).lower()
            assert head.startswith(b"http/1.1 200")
            assert b"\r\nconnection: close\r\n" not in head
        sock.sendall(later.replace(b"Host: test\r\n", b""))
        assert "one Host header" in refused(read_all(sock), 400)
        slow.sendall(request(*upgrade, body=content(77)).replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        slow.shutdown(socket.SHUT_WR)
        assert read_all(slow).startswith(bounds.CONTINUE + b"HTTP/1.1 200")


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"3.0", b"2", b"2.1", b"0.1"])
def test_another_version_of_http_is_not_taken_for_one_that_is_spoken(version: bytes) -> None:
    """505, on a fresh connection and on a used one, also for the first bytes of HTTP/2."""
    other = request(b"Connection: Upgrade", b"Upgrade: h2c").replace(b"HTTP/1.1", b"HTTP/" + version, 1)
    with serving(Waits()) as client, raw(client) as first, raw(client) as used, raw(client) as preface:
        first.sendall(other)
        assert "HTTP/1.1" in refused(read_all(first), 505)
        used.sendall(request())
        assert used.recv(2**16).startswith(b"HTTP/1.1 200")
        used.sendall(other)
        refused(read_all(used), 505)
        preface.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        refused(read_all(preface), 505)


def test_an_answer_is_let_go_of_though_its_request_had_time_left() -> None:
    """A request's own timeout holds nothing back once it is settled."""
    kept: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    write = Inference._write

    def watched(self: Inference, result: Result, asked: InferRequest) -> Answer:
        for tensor in result.outputs.values():
            kept.add(tensor)
        return write(self, result, asked)

    body = json.dumps({**json.loads(content()), "parameters": {"timeout": 50_000_000}}).encode()
    with mock.patch.object(Inference, "_write", watched), serving(Waits()) as client:
        for _ in range(20):
            assert client.post(INFER, content=body).status_code == 200
        wait_until(lambda: len(kept) <= 1, timeout=10)


@pytest.mark.parametrize("head", [b"HEAD / HTTP/1.1\r\nHost: a b\r\n\r\n", b"HEAD / HTTP/3.0\r\nHost: test\r\n\r\n"])
def test_what_asks_for_headers_alone_is_refused_without_a_body(head: bytes) -> None:
    """With its length; what comes behind such a request is refused with one."""
    with serving(Waits()) as client, raw(client) as sock, raw(client) as other:
        sock.sendall(head)
        received = read_all(sock)
        assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 505"))
        assert received.endswith(b"connection: close\r\n\r\n")
        assert b"content-length: 0" not in received
        other.sendall(LIVE.replace(b"GET", b"HEAD") + b"\r\n")
        assert other.recv(2**16).startswith(b"HTTP/1.1 200")
        other.sendall(b"garbage\r\n\r\n")
        refused(read_all(other), 400)
