"""Scrapes share a rendering, whoever asks for it, and leave forwards the interpreter."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import pytest
from prometheus_client import CONTENT_TYPE_LATEST
from served_models import Net
from serving import serving

from guardserve.metrics import Metrics
from guardserve.service import scraping
from guardserve.service.scraping import Scraping

METRICS = b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n"


def slow(_: str) -> bytes:
    """Take a processor for a while."""
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    return b""


def test_clients_that_ask_and_go_keep_no_other_from_being_told() -> None:
    """However many they are: there is no rendering for each."""
    render, busy, go_on = Metrics.render, threading.Event(), threading.Event()
    renderings = 0

    def counted(metrics: Metrics, content_type: str = CONTENT_TYPE_LATEST) -> bytes:
        nonlocal renderings
        renderings += 1
        busy.set()
        assert go_on.wait(20)
        return render(metrics, content_type)

    with mock.patch.object(Metrics, "render", counted), serving(Net()) as client, ExitStack() as stack:
        address = client.base_url.host, client.base_url.port or 80
        first = stack.enter_context(socket.create_connection(address, timeout=20))
        first.sendall(METRICS)
        assert busy.wait(20)
        for _ in range(30):
            with socket.create_connection(address) as gone:
                gone.sendall(METRICS)
                time.sleep(0.01)
        last = stack.enter_context(socket.create_connection(address, timeout=20))
        last.sendall(METRICS)
        go_on.set()
        for sock in (first, last):
            assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        assert renderings <= 5


def test_all_who_ask_before_a_rendering_begins_have_that_one() -> None:
    """Each in the format that it asked for; who asks later has another; and one that goes takes it from nobody."""
    renderings: Counter[str] = Counter()

    def render(content_type: str) -> bytes:
        renderings[content_type] += 1
        return content_type.encode()

    async def go() -> None:
        scrapes = Scraping(render, lambda: False)
        kinds = ["text", "other"] * 20
        asked = [asyncio.ensure_future(scrapes.scrape(kind)) for kind in kinds]
        await asyncio.sleep(0)
        asked[0].cancel()
        assert await asyncio.gather(*asked[1:]) == [kind.encode() for kind in kinds[1:]]
        assert renderings == {"text": 1, "other": 1}
        assert await scrapes.scrape("text") == b"text"
        assert renderings == {"text": 2, "other": 1}

    asyncio.run(go())


def test_a_rendering_that_fails_keeps_none_from_the_others() -> None:
    """Who asked for it is told; the next one is another."""
    outcomes = iter([b"", b"text"])

    async def go() -> None:
        scrapes = Scraping(lambda _: next(outcomes) or bytes([256]), lambda: False)
        with pytest.raises(ValueError, match="range"):
            await scrapes.scrape("text")
        assert await scrapes.scrape("text") == b"text"

    asyncio.run(go())


def test_what_takes_long_to_render_is_rendered_less_often() -> None:
    """So that it has no more than its share of a processor."""

    async def go() -> float:
        scrapes, began = Scraping(slow, lambda: False), time.monotonic()
        for _ in range(4):
            await scrapes.scrape("text")
        return time.monotonic() - began

    assert asyncio.run(go()) >= 3 * 0.02 / scraping.SHARE


def test_one_slow_rendering_keeps_the_next_waiting_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been slow by chance."""
    monkeypatch.setattr(scraping, "SHARE", 1e-6)
    monkeypatch.setattr(scraping, "LONGEST", 0.2)

    async def go() -> None:
        scrapes = Scraping(slow, lambda: False)
        await scrapes.scrape("text")
        began = time.monotonic()
        await asyncio.wait_for(scrapes.scrape("text"), 20)
        assert time.monotonic() - began >= 0.2

    asyncio.run(go())


def test_a_server_that_stops_keeps_no_scrape_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its answer at once."""
    monkeypatch.setattr(scraping, "SHARE", 1e-9)
    monkeypatch.setattr(scraping, "LONGEST", 1000.0)
    with ExitStack() as stack:
        with serving(Net()) as client:
            client.get("/metrics").raise_for_status()
            address = client.base_url.host, client.base_url.port or 80
            waits = stack.enter_context(socket.create_connection(address, timeout=10))
            waits.sendall(METRICS)
            time.sleep(0.5)
            stopped = time.monotonic()
        assert time.monotonic() - stopped < 20
        assert waits.recv(2**16).startswith(b"HTTP/1.1 200")
