"""Large requests are read aside: what is long holds up neither what is short nor anything when nobody waits for it."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from serving import metric, serving, wait_until
from torch import nn

from guardserve.service.array_text import ArrayText
from guardserve.service.lanes import SHORT, WAY, Lanes, NobodyWaitsError
from guardserve.service.limits import unlimited
from guardserve.signature import TensorSpec

INFER = "/v2/models/net/infer"
COUNT = SHORT // 2
VALUES = b",".join([b"0"] * COUNT)
LONG = b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":[%b]}]}' % (COUNT, VALUES)
PACKED = {"Content-Encoding": "gzip"}


class Mean(nn.Module):
    """The mean of however many features, through a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        y: torch.Tensor = self.bn(x.mean(1, keepdim=True))
        return y


@pytest.fixture
def serve() -> Any:
    """Return what serves the model with long requests allowed."""
    return partial(serving, Mean(), TensorSpec("x", torch.float32, (-1, -1)), max_body_size=4 * SHORT)


class Slow:
    """Reading arrays that does not come to an end before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pause: float = 0.2) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        lists = ArrayText.lists

        def slowly(text: ArrayText, shape: list[int]) -> Iterator[list[Any]]:
            for values in lists(text, shape):
                self.began.set()
                yield values
                self.may_end.wait(pause)

        monkeypatch.setattr(ArrayText, "lists", slowly)


@pytest.mark.parametrize(("sent", "headers"), [(gzip.compress(LONG), PACKED), (LONG, {})], ids=["gzip", "plain"])
def test_short_requests_are_answered_while_a_long_one_is_read(
    sent: bytes, headers: dict[str, str], serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed ones too, which are read aside as well; then the long one has its answer."""
    slow = Slow(monkeypatch, pause=60)
    short = gzip.compress(json.dumps({"inputs": [tensor([1.0, 2.0])]}).encode())
    with serve() as client, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.post, INFER, content=sent, headers=headers, timeout=60)
        try:
            assert slow.began.wait(30)
            for _ in range(5):
                assert client.post(INFER, content=short, headers=PACKED).status_code == 200
            assert not answer.done()
        finally:
            slow.may_end.set()
        assert answer.result().status_code == 200


def tensor(values: list[float]) -> dict[str, Any]:
    """Return an input of one row."""
    return {"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}


def test_a_long_request_is_read_no_further_when_its_client_has_gone(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted as 499; the next one's turn comes at once."""
    slow = Slow(monkeypatch)
    with serve(request_timeout=60.0) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\n" % INFER.encode())
            connection.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(LONG), LONG))
            assert slow.began.wait(30)
        wait_until(lambda: metric(client, 'guardserve_requests_total{model="net",status="499"}') == 1, timeout=10)
        slow.may_end.set()
        assert client.post(INFER, content=LONG).status_code == 200


def test_a_long_request_is_read_no_further_when_its_time_is_over(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its 504 then, not when it has been read."""
    Slow(monkeypatch)
    with serve(request_timeout=0.5) as client:
        answer: httpx.Response = client.post(INFER, content=LONG, timeout=60)
        assert answer.status_code == 504


def test_what_is_long_makes_way_for_what_is_short() -> None:
    """Before each piece, as long as there is any, but for no longer than it has worked: it comes to its end."""
    pieces = 200

    async def lanes() -> tuple[float, float, float]:
        lanes, may_end = Lanes(), threading.Event()
        hold = lanes.makes_way(unlimited, time.monotonic() + 60, threading.Event())

        async def seconds(times: int) -> float:
            await asyncio.sleep(WAY)
            began = time.monotonic()
            await lanes.long(lambda: [hold(0) for _ in range(times)])
            return time.monotonic() - began

        short = asyncio.ensure_future(lanes.short(partial(may_end.wait, 60)))
        once, often = await seconds(1), await seconds(pieces)
        may_end.set()
        await short
        alone = await seconds(1)
        assert lanes.busy == 0
        lanes.close()
        with pytest.raises(NobodyWaitsError):
            hold(0)
        return once, often, alone

    once, often, alone = asyncio.run(lanes())
    assert WAY <= once < 30
    assert often < pieces * WAY / 2
    assert alone < 30
