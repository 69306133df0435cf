"""More than the server can do: it says so at once, drops what nobody waits for, and recovers."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import torch
from serving import metric, serving, wait_until
from torch import nn

from guardserve.service import bounds, gateway
from guardserve.service.reading import Reading
from guardserve.service.request import InferRequest
from guardserve.signature import TensorSpec

INFER = "/v2/models/net/infer"


class Gate(nn.Module):
    """A model that waits at a gate for inputs that begin with 77, and remembers the first features that it saw."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.open = threading.Event()
        self.seen: list[float] = []
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, when the gate is open."""
        self.seen += x[:, 0].tolist()
        if (x[:, 0] == 77).any():
            self.open.wait(30)
        time.sleep(self.seconds)
        y: torch.Tensor = self.bn(x)
        return y


class Mean(nn.Module):
    """The mean of however many features, through a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        y: torch.Tensor = self.bn(x.float().mean(1, keepdim=True))
        return y


SMALL = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}


def body(first: float, **parameters: Any) -> dict[str, Any]:
    """Return a request of one row."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1.0, 2.0]}
    return {"parameters": parameters, "inputs": [tensor]}


@contextmanager
def blocked(model: Gate, **limits: Any) -> Iterator[tuple[httpx.Client, ThreadPoolExecutor, Future[httpx.Response]]]:
    """Serve a model whose worker waits at the gate; give a client, threads, and the answer that is to come."""
    with serving(model, **limits) as client, ThreadPoolExecutor(8) as threads:
        try:
            first = threads.submit(client.post, INFER, json=body(77), timeout=30)
            wait_until(lambda: 77 in model.seen)
            yield client, threads, first
        finally:
            model.open.set()


def errors(client: httpx.Client, reason: str) -> float:
    """Read how many requests failed for a reason."""
    return metric(client, f'guardserve_request_errors_total{{model="net",reason="{reason}"}}')


def waiting(client: httpx.Client) -> float:
    """Read how many requests wait."""
    return metric(client, 'guardserve_queue_size{model="net"}')


def test_a_full_queue_is_said_at_once_and_health_and_metrics_still_answer() -> None:
    """503 with Retry-After; what was accepted before is answered once the model goes on."""
    model = Gate()
    with blocked(model, max_queue_size=2) as (client, threads, first):
        accepted = [threads.submit(client.post, INFER, json=body(n), timeout=30) for n in (1, 2)]
        wait_until(lambda: waiting(client) == 2)
        waits = []
        for _ in range(3):  # the machine may be busy with something else
            started = time.monotonic()
            refused = client.post(INFER, json=body(3))
            waits.append(time.monotonic() - started)
        assert min(waits) < 1
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "2 requests are waiting" in refused.json()["error"]
        assert client.get("/v2/health/ready").status_code == 200
        assert errors(client, "overloaded") == 3
        model.open.set()
        assert [answer.result().status_code for answer in (first, *accepted)] == [200] * 3
        assert client.post(INFER, json=body(4)).status_code == 200
    assert 3.0 not in model.seen


@pytest.mark.parametrize("size", [0, 300_000], ids=["short way", "long way"])
def test_what_comes_when_the_queue_is_full_is_refused_unread(size: int) -> None:
    """Whatever it is: to read it would keep the interpreter from the forwards of those that were accepted."""
    model = Gate()
    with blocked(model, max_queue_size=1) as (client, threads, first):
        second = threads.submit(client.post, INFER, json=body(1))
        wait_until(lambda: metric(client, 'guardserve_queue_size{model="net"}') == 1)
        with mock.patch.object(Reading, "read", side_effect=AssertionError) as read:
            refused = client.post(INFER, content=b"{no JSON" + b" " * size)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert read.call_count == 0
        model.open.set()
        assert [answer.result().status_code for answer in (first, second)] == [200, 200]
        assert client.post(INFER, content=b"{no JSON").status_code == 400


def test_each_request_that_fails_gives_way_to_the_forwards() -> None:
    """A flood of them would have the interpreter again before the other thread has woken up; good ones do not wait."""
    with serving(Gate(), max_body_size=1000) as client, mock.patch.object(gateway, "time", wraps=time) as clock:
        assert client.post(INFER, json=body(1)).status_code == 200
        assert clock.sleep.mock_calls == []
        for count, content in enumerate((b"{no JSON", b" " * 2000), start=1):
            assert client.post(INFER, content=content).is_client_error
            assert clock.sleep.mock_calls == [mock.call(gateway.PAUSE)] * count


def test_a_request_whose_time_is_over_gets_504_and_is_never_run() -> None:
    """Its own time in microseconds, or the server's; the model does not see it."""
    model = Gate()
    with blocked(model, request_timeout=0.4) as (client, _, first):
        for sent, expected in ((body(1, timeout=50_000), 0.05), (body(2), 0.4)):
            waits = []
            for _ in range(3):  # the machine may be busy with something else
                started = time.monotonic()
                answer = client.post(INFER, json=sent)
                waits.append(time.monotonic() - started)
                assert answer.status_code == 504
                assert "time was over" in answer.json()["error"]
            assert expected <= min(waits) < expected + 0.5
        assert first.result().status_code == 504, "its forward has begun, but nobody waits for it any more"
        assert errors(client, "timeout") == 7
        model.open.set()
        assert client.post(INFER, json=body(3)).status_code == 200
    assert {1.0, 2.0}.isdisjoint(model.seen)


@pytest.mark.parametrize("timeout", [-1, 1.5, "1"])
def test_a_timeout_that_is_none_is_refused(timeout: object) -> None:
    """It must be a whole number of microseconds."""
    with serving(Gate()) as client:
        answer = client.post(INFER, json=body(1, timeout=timeout))
        assert answer.status_code == 400
        assert "timeout" in answer.json()["error"]
        assert client.post(INFER, json=body(1, timeout=0)).status_code == 200


@pytest.mark.parametrize("size", [0, 2**18])
def test_a_client_that_goes_away_takes_its_waiting_request_with_it(size: int) -> None:
    """The model never sees it, and it is counted as 499."""
    model = Gate()
    with blocked(model) as (client, _, _):
        with raw(client) as connection:
            connection.sendall(http({**body(5), "id": "x" * size}))
            wait_until(lambda: waiting(client) == 1)
        wait_until(lambda: waiting(client) == 0)
        wait_until(lambda: errors(client, "disconnected") == 1)
        assert metric(client, 'guardserve_requests_total{model="net",status="499"}') == 1
        model.open.set()
        assert client.post(INFER, json=body(6)).status_code == 200
    assert 5.0 not in model.seen


def test_a_body_that_does_not_come_is_waited_for_so_long_and_no_longer() -> None:
    """408, the connection is closed, and others are served meanwhile."""
    with serving(Gate(), body_timeout=0.3) as client, raw(client) as connection:
        connection.sendall(http(body(1))[:-20])
        assert client.post(INFER, json=body(2)).status_code == 200
        answer = read_all(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert b"took longer than 0.3 s" in answer
        assert errors(client, "slow_body") == 1


def test_a_client_that_goes_away_in_its_body_is_counted_and_harms_nobody() -> None:
    """Half of a request is none."""
    with serving(Gate()) as client:
        with raw(client) as connection:
            connection.sendall(http(body(1))[:-20])
            wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 1)
        wait_until(lambda: errors(client, "disconnected") == 1)
        assert client.post(INFER, json=body(2)).status_code == 200
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"GET / SMTP/9\r\n\r\n", b"\0" * 1000, b"POST  \r\n\r\n"])
def test_bytes_that_are_no_http_are_refused_and_harm_nobody(garbage: bytes) -> None:
    """The connection ends; the next one is served."""
    with serving(Gate()) as client:
        with raw(client) as connection:
            connection.sendall(garbage)
            assert b" 200 " not in read_all(connection)
        assert client.post(INFER, json=body(2)).status_code == 200


def test_bodies_held_at_once_are_bounded_together() -> None:
    """Requests that wait count with their bodies; more get 503 until there is room."""
    model = Gate()
    size = len(json.dumps(body(1)))
    with blocked(model, max_pending_size=4 * size) as (client, threads, first):
        accepted = threads.submit(client.post, INFER, json=body(1), timeout=30)
        wait_until(lambda: waiting(client) == 1)
        large = {**body(2), "id": "x" * 2 * size}
        answer = client.post(INFER, json=large)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        model.open.set()
        assert first.result().status_code == accepted.result().status_code == 200
        assert client.post(INFER, json=large).status_code == 200


def test_more_connections_than_may_be_get_503_but_health_and_metrics_answer() -> None:
    """Each is closed after its answer; once there is room all is as before."""
    with serving(Gate(), max_connections=3) as client:
        assert client.post(INFER, json=body(1)).status_code == 200
        with raw(client) as one, raw(client) as two, raw(client) as three:
            for connection in (one, two, three):
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
                assert b" 200 " in connection.recv(1000)
            with raw(client) as fourth:
                fourth.sendall(http(body(2)))
                answer = read_all(fourth)
                assert b" 503 " in answer.splitlines()[0]
                assert b"as many connections as it may" in answer
            with raw(client) as fifth:
                fifth.sendall(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
                assert b"guardserve_model_ready" in read_all(fifth), "and the connection was closed"
        assert metric(client, 'guardserve_requests_total{model="net",status="503"}') == 1
        assert errors(client, "overloaded") == 1
        wait_until(lambda: client.post(INFER, json=body(3)).status_code == 200)


def test_connections_that_say_nothing_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, health is answered; those that have asked for something keep theirs."""
    monkeypatch.setattr(bounds, "SLACK", 2)
    with serving(Gate(), max_connections=3) as client, ExitStack() as stack:
        assert client.get("/v2/health/live").status_code == 200
        silent = [stack.enter_context(raw(client)) for _ in range(20)]
        for one in silent:
            with suppress(ConnectionError):
                one.sendall(b"GET / HT")
        assert client.get("/v2/health/live").status_code == 200
        for _ in range(5):
            health = httpx.get(f"{client.base_url}/v2/health/live", trust_env=False)
            assert health.status_code == 200
        assert read_all(silent[0]) == b""
        assert client.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize("start", [b"", b"POST /v2/models/net/infer HT", b"GET / HTTP/1.1\r\nHost: te"])
def test_a_connection_that_never_says_what_it_wants_is_closed(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a byte, or with a part of the headers, also after a whole request."""
    monkeypatch.setattr(bounds, "HEADER_TIMEOUT", 0.3)
    with serving(Gate()) as client:
        for before in (b"", b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n"):
            if before and not start:
                continue
            with raw(client) as slow:
                if before:
                    slow.sendall(before)
                    assert b" 200 " in slow.recv(1000)
                slow.sendall(start)
                started = time.monotonic()
                read_all(slow)
                assert 0.2 < time.monotonic() - started < 3
        assert client.post(INFER, json=body(2)).status_code == 200


def test_a_forward_that_hangs_is_504_and_unready_until_the_server_has_recovered() -> None:
    """Its request is told, readiness fails, another thread passes the self-test, and all is counted."""
    model = Gate()
    with blocked(model, forward_timeout=1.0) as (client, _, first):
        assert first.result().status_code == 504
        assert "longer than 1 s" in first.result().json()["error"]
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.post(INFER, json=body(1)).status_code == 200
        assert metric(client, 'guardserve_faults_total{kind="hang",model="net"}') == 1
        assert metric(client, 'guardserve_recoveries_total{model="net"}') == 1


def test_ten_times_too_much_is_answered_or_refused_without_growing() -> None:
    """Every request gets exactly one answer, those accepted soon, and afterwards all is as before."""
    model = Gate(seconds=0.005)
    with serving(model, max_queue_size=8, max_batch_size=1) as client:
        client.post(INFER, json=body(1))
        before, threads = resident(), threading.active_count()
        outcomes: Counter[int] = Counter()
        slowest: list[float] = []
        end = time.monotonic() + 4

        def hammer() -> None:
            with httpx.Client(base_url=client.base_url, trust_env=False, timeout=30) as mine:
                while time.monotonic() < end:
                    started = time.monotonic()
                    status = mine.post(INFER, json=body(1)).status_code
                    outcomes[status] += 1
                    if status == 200:
                        slowest.append(time.monotonic() - started)

        with ThreadPoolExecutor(32) as pool:
            for done in [pool.submit(hammer) for _ in range(32)]:
                done.result()
        assert set(outcomes) == {200, 503}
        assert sorted(slowest)[int(0.99 * len(slowest))] < 2
        assert metric(client, 'guardserve_requests_total{model="net",status="200"}') == outcomes[200] + 1
        assert metric(client, 'guardserve_requests_total{model="net",status="503"}') == outcomes[503]
        assert waiting(client) == metric(client, 'guardserve_requests_in_flight{model="net"}') == 0
        assert client.post(INFER, json=body(1), timeout=1).status_code == 200
        assert resident() - before < 40 * 2**20
        assert threading.active_count() <= threads + 2


def resident() -> int:
    """Return this process's resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def http(request: dict[str, Any]) -> bytes:
    """Write a request as it goes over the wire."""
    content = json.dumps(request).encode()
    return f"POST {INFER} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def raw(client: httpx.Client) -> Iterator[socket.socket]:
    """Connect to a client's server without any HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def test_what_is_made_of_a_body_counts_as_held() -> None:
    """Decompressed, as tensors or as pixels it may be a thousand times what came; there is no answer but 503."""
    numbers = b"[" + b",".join([b"1"] * 2**18) + b"]"
    text = b'{"inputs":[{"name":"x","shape":[1,262144],"datatype":"FP64","data":%b}]}' % numbers
    bodies = {"decompressed": (gzip.compress(text), {"Content-Encoding": "gzip"}), "as a tensor": (text, {})}
    spec = TensorSpec("x", torch.float64, (-1, -1))
    with serving(Mean(), spec, max_pending_size=2**20) as client:
        for why, (sent, headers) in bodies.items():
            assert len(sent) < 2**20
            answer = client.post(INFER, content=sent, headers=headers)
            assert (answer.status_code, "as many requests as it can" in answer.text) == (503, True), why
        assert errors(client, "overloaded") == 2
        assert client.post(INFER, json=body(1) | {"inputs": [{**SMALL, "datatype": "FP64"}]}).status_code == 200
    with serving(Mean(), spec, max_pending_size=2**23) as client:
        for sent, headers in bodies.values():
            for _ in range(4):  # nothing stays held
                assert client.post(INFER, content=sent, headers=headers).status_code == 200


def test_a_large_request_that_waits_too_long_to_be_read_gets_504(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came before it took its time, and nobody waits for it any more."""
    gate, read = threading.Event(), Reading.read
    began: list[float] = []

    def slowly(*arguments: Any, **named: Any) -> InferRequest:
        began.append(time.monotonic())
        gate.wait(30)
        return read(*arguments, **named)

    monkeypatch.setattr(Reading, "read", slowly)
    sent, headers = gzip.compress(json.dumps(body(1)).encode()), {"Content-Encoding": "gzip"}
    with serving(Gate(), request_timeout=0.5) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.post, INFER, content=sent, headers=headers, timeout=30)
        wait_until(lambda: began)
        second = threads.submit(client.post, INFER, content=sent, headers=headers, timeout=30)
        wait_until(lambda: metric(client, 'guardserve_requests_in_flight{model="net"}') == 2)
        time.sleep(1.0)
        gate.set()
        assert second.result().status_code == 504
        assert first.result().status_code in (200, 504), "it has its time from here on"
        assert len(began) == 1


def test_others_are_answered_while_a_compressed_bomb_of_json_is_read() -> None:
    """A few kilobytes that say millions of times NaN keep nobody waiting for as long as they take."""
    text = b'{"inputs":[{"name":"x","shape":[1,4194304],"datatype":"FP32","data":[%b]}]}'
    bomb = gzip.compress(text % b",".join([b"NaN"] * 2**22))
    with (
        serving(Mean(), TensorSpec("x", torch.float32, (-1, -1)), max_body_size=2**25) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        began = time.monotonic()
        reading = thread.submit(client.post, INFER, content=bomb, headers={"Content-Encoding": "gzip"}, timeout=60)
        waits = []
        with httpx.Client(base_url=client.base_url, trust_env=False) as other:
            while not reading.done():
                asked = time.monotonic()
                assert other.get("/v2/health/live").status_code == 200
                waits.append(time.monotonic() - asked)
        assert reading.result().status_code == 400
        assert "non-finite" in reading.result().text
        assert len(waits) > 10
        assert sum(waits) / len(waits) < (time.monotonic() - began) / 10
