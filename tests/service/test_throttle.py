"""What needs no forward has its turn now and then; forwards wait for none of it."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import httpx
import pytest
from served_models import Net
from serving import serving

from guardserve.service import throttle
from guardserve.service.access import Access
from guardserve.service.app import create_app
from guardserve.service.throttle import Throttle

INFER = "/v2/models/net/infer"
KEY = "0123456789abcdef"


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """Write a request as it goes over the wire."""
    lines = [f"{line} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


GOOD = request(
    f"POST {INFER}",
    f"Authorization: Bearer {KEY}",
    body=json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}).encode(),
)
LIVE = request("GET /v2/health/live")

CHEAP = {
    "unknown path": request("GET /nothing", f"Authorization: Bearer {KEY}"),
    "health": LIVE,
    "metrics": request("GET /metrics"),
    "no key": request(f"POST {INFER}", body=b"{}"),
    "unknown model": request("POST /v2/models/no/infer", f"Authorization: Bearer {KEY}", body=b"{}"),
    "no HTTP": b"\x16\x03\x01",
    "pipelined": LIVE * 2,
}


@contextmanager
def slow_turns() -> Iterator[None]:
    """Let a second turn come so late that a test does not see it, with no credit."""
    with mock.patch.multiple(throttle, INTERVAL=1000.0, CREDIT=0.0):
        yield


def received(sock: socket.socket, seconds: float) -> bytes:
    """Read what comes within so many seconds."""
    sock.settimeout(seconds)
    try:
        return sock.recv(2**20)
    except TimeoutError:
        return b""


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    """Connect to a client's server without any HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as sock:
        yield sock


@pytest.mark.parametrize("cheap", CHEAP)
def test_what_needs_no_forward_waits_for_its_turn_and_forwards_do_not(cheap: str) -> None:
    """Whatever it is, on a connection of its own; it is answered when the turn comes."""
    keyed = functools.partial(create_app, access=Access([KEY]))
    with (
        slow_turns(),
        mock.patch("serving.create_app", keyed),
        serving(Net()) as client,
        connected(client) as first,
        connected(client) as second,
        connected(client) as model,
    ):
        first.sendall(LIVE)
        assert received(first, 10).startswith(b"HTTP/1.1 200")
        second.sendall(CHEAP[cheap])
        for _ in range(5):
            model.sendall(GOOD)
            assert received(model, 10).startswith(b"HTTP/1.1 200")
        assert received(second, 0.2) == b""


def test_a_flood_of_what_needs_no_forward_is_answered_wholly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its answer, in time, however many there are; and those that went away while they waited nobody's."""
    monkeypatch.setattr(throttle, "CREDIT", 0.0)
    with serving(Net()) as client:
        for kind in ("unknown path", "no HTTP", "health"):
            socks = [socket.create_connection((client.base_url.host, client.base_url.port or 80)) for _ in range(60)]
            for sock in socks:
                sock.sendall(CHEAP[kind])
            for sock in socks[::2]:
                sock.close()
            for sock in socks[1::2]:
                assert received(sock, 10).startswith(b"HTTP/1.1 ")
                sock.close()


def test_connections_that_wait_are_answered_before_they_take_the_place_of_others() -> None:
    """With more than half of all, the first of them does not wait on."""
    with slow_turns(), serving(Net(), max_connections=16) as client:
        socks = [socket.create_connection((client.base_url.host, client.base_url.port or 80)) for _ in range(12)]
        for sock in socks:
            sock.sendall(LIVE)
            time.sleep(0.05)
        answered = [received(sock, 10 if n < 4 else 0.5)[:12] for n, sock in enumerate(socks)]
        assert answered == [b"HTTP/1.1 200"] * 4 + [b""] * 8
        for sock in socks:
            sock.close()


def test_a_flood_from_hundreds_of_connections_waits_for_its_turns() -> None:
    """All of those that so many may have beside others."""
    with slow_turns(), serving(Net()) as client, ExitStack() as stack:
        socks = [stack.enter_context(connected(client)) for _ in range(300)]
        for sock in socks:
            sock.sendall(LIVE)
        assert received(socks[0], 10).startswith(b"HTTP/1.1 200")
        with connected(client) as model:
            model.sendall(GOOD)
            assert received(model, 10).startswith(b"HTTP/1.1 200")
        time.sleep(0.3)
        for sock in socks[1:]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)


def test_a_server_that_stops_answers_who_waits_for_a_turn() -> None:
    """At once, and each of them."""
    with ExitStack() as stack:
        with slow_turns(), serving(Net()) as client:
            first, second, third = [stack.enter_context(connected(client)) for _ in range(3)]
            first.sendall(LIVE)
            assert received(first, 10).startswith(b"HTTP/1.1 200")
            second.sendall(b"\x16\x03\x01")
            third.sendall(LIVE)
            assert received(third, 0.2) == b""
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 20
        assert received(second, 10).startswith(b"HTTP/1.1 400")
        assert received(third, 10).startswith(b"HTTP/1.1 200")


def test_those_that_have_gone_keep_nobody_waiting() -> None:
    """They have no turn."""
    with mock.patch.multiple(throttle, INTERVAL=1.0, CREDIT=0.0), serving(Net()) as client, connected(client) as last:
        for n in range(13):
            with connected(client) as sock:
                sock.sendall(LIVE if n % 2 else b"\x16\x03\x01")
                time.sleep(0.02)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        last.sendall(LIVE)
        began = time.monotonic()
        assert received(last, 20).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 5


def run(*calls: tuple[float, str], seconds: float) -> list[tuple[str, float]]:
    """Let things ask for turns, each after so many seconds; return what had one within others, and when."""
    done: list[tuple[str, float]] = []

    async def go() -> None:
        loop = asyncio.get_running_loop()
        turns, began = Throttle(line=100), loop.time()
        for when, name in calls:
            await asyncio.sleep(max(0.0, began + when - loop.time()))
            turns.call(lambda name=name: done.append((name, loop.time() - began)))  # type: ignore[misc]
        await asyncio.sleep(seconds)

    asyncio.run(go())
    return done


def test_few_have_their_turn_at_once_and_many_one_after_the_other() -> None:
    """In the order in which they came, no more in a while than there may be."""
    few = run(*[(0.0, str(n)) for n in range(20)], seconds=0.0)
    assert [name for name, _ in few] == [str(n) for n in range(20)]
    many = run(*[(0.0, str(n)) for n in range(130)], seconds=1.5)
    assert [name for name, _ in many] == [str(n) for n in range(130)]
    at_once = throttle.CREDIT / throttle.INTERVAL + 1
    for n, (_, when) in enumerate(many):
        assert when >= (n - at_once) * throttle.INTERVAL - 0.001, n


def test_when_too_many_wait_the_first_goes_on() -> None:
    """So many wait as may, and all have their turn in order."""
    with slow_turns():
        assert [name for name, _ in run(*[(0.0, str(n)) for n in range(130)], seconds=0.0)] == [
            str(n) for n in range(30)
        ]


def test_one_that_fails_keeps_no_turn_from_the_others() -> None:
    """The others go on."""
    done: list[int] = []

    async def go() -> None:
        turns = Throttle()
        asyncio.get_running_loop().set_exception_handler(lambda *_: done.append(-1))
        with mock.patch.object(throttle, "CREDIT", 0.0):
            turns.call(lambda: done.append(0))
            turns.call(lambda: 1 // 0)
            turns.call(lambda: done.append(1))
            await asyncio.sleep(0.5)

    asyncio.run(go())
    assert done == [0, -1, 1]
