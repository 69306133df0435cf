"""Faults under load: each is the answer of the request that met it, nothing else is harmed, and the metrics tell."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import TIMEOUT, free_port, is_ready, metric, serving, wait_until
from torch import nn

from guardserve import ReferenceProfile
from guardserve.monitor import Monitor
from guardserve.watch import even_clock

INFER = "/v2/models/net/infer"
RAISE, NAN, HANG, DEVICE = 7.0, -7.0, 77.0, 777.0


class Faulty(nn.Module):
    """Doubles its input, or does as the first feature of a row says."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.memory = 1000
        self.broken = False
        self.most = 0
        self.go_on = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise, give NaN, hang, fail as a device does until it is mended, or need memory for each row."""
        time.sleep(0.003)
        self.most = max(self.most, len(x))
        first = x[:, 0]
        self.bn(x)
        if (first == RAISE).any():
            raise ValueError("seven")
        if (first == HANG).any():
            self.go_on.wait(30)
        self.broken |= bool((first == DEVICE).any())
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if len(x) > self.memory:
            raise torch.cuda.OutOfMemoryError("no memory")
        y: torch.Tensor = self.factor * x
        return y.masked_fill(x[:, :1] == NAN, float("nan"))


def body(first: float, **parameters: Any) -> dict[str, Any]:
    """Return a request of one row."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1.0, 2.0]}
    return {"parameters": parameters, "inputs": [tensor]}


@contextmanager
def load(client: httpx.Client, *, right: bool = True) -> Iterator[Counter[int]]:
    """Send requests without a pause until the block ends, each with numbers of its own; count the answers by status.

    An answer that does not come fails the test, and so does one that is not that of its own request if all are right.
    """
    outcomes: Counter[int] = Counter()
    wrong: list[str] = []
    stop = threading.Event()
    numbers = itertools.count(1000)

    def ask() -> None:
        with httpx.Client(base_url=client.base_url, trust_env=False, timeout=TIMEOUT) as mine:
            while not stop.is_set():
                number = float(next(numbers))
                try:
                    answer = mine.post(INFER, json=body(number))
                except httpx.HTTPError as error:
                    wrong.append(f"no answer: {error!r}")
                    return
                outcomes[answer.status_code] += 1
                if (
                    right
                    and answer.status_code == 200
                    and answer.json()["outputs"][0]["data"] != [2 * number, 2.0, 4.0]
                ):
                    wrong.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: outcomes[200] > 20)
        yield outcomes
        good = outcomes[200]
        wait_until(lambda: outcomes[200] > good + 20)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def counted(client: httpx.Client) -> int:
    """Return how many requests have ended, by the metrics."""
    lines = client.get("/metrics").text.splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("guardserve_requests_total{"))


def half_sent(client: httpx.Client) -> None:
    """Send a part of a request, and go away."""
    content = json.dumps(body(1.0)).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode())
        connection.sendall(content[:-9])
        time.sleep(0.05)


def garbage(client: httpx.Client) -> None:
    """Send what is no HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(b"\x16\x03\x01" + bytes(range(256)) * 10)
        time.sleep(0.05)


FAULTS: dict[str, tuple[Callable[[httpx.Client], object], set[int]]] = {
    "raising": (lambda client: client.post(INFER, json=body(RAISE)), {500}),
    "nan-output": (lambda client: client.post(INFER, json=body(NAN)), {500}),
    "nan-input": (lambda client: client.post(INFER, content=json.dumps(body(float("nan")))), {400}),
    "half-sent": (half_sent, {499}),
    "garbage": (garbage, set()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_answer_of_the_request_that_met_it_and_of_no_other(fault: str) -> None:
    """What shares its forward is answered as if it had not been there; each request is counted once."""
    inject, statuses = FAULTS[fault]
    with serving(Faulty()) as client:
        with load(client) as outcomes:
            for _ in range(5):
                inject(client)
        assert set(outcomes) == {200}
        answered = {200: outcomes.total()} | dict.fromkeys(statuses, 5)
        for status, count in answered.items():
            series = f'guardserve_requests_total{{model="net",status="{status}"}}'
            wait_until(lambda series=series, count=count: metric(client, series) == count)  # type: ignore[misc]
        assert client.get("/v2/health/ready").status_code == 200
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


def test_a_forward_that_hangs_costs_its_batch_and_the_moment_until_another_thread_is_tested() -> None:
    """Its requests are 504, others 503 until the model is ready again; the old thread disturbs nobody when it ends."""
    model = Faulty()
    with serving(model, forward_timeout=1.0) as client:
        with load(client) as outcomes:
            assert client.post(INFER, json=body(HANG)).status_code == 504
            wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert set(outcomes) <= {200, 503, 504}
        assert counted(client) == outcomes.total() + 1
        assert metric(client, 'guardserve_faults_total{kind="hang",model="net"}') == 1
        with load(client) as outcomes:
            model.go_on.set()
        assert set(outcomes) == {200}


def test_memory_that_does_not_suffice_for_a_batch_suffices_for_its_halves() -> None:
    """Everybody is answered, nothing is unready, and it is counted."""
    model = Faulty()
    with serving(model, max_queue_delay=0.02) as client:
        with load(client) as outcomes:
            wait_until(lambda: model.most > 4)
            model.memory = 4
            wait_until(lambda: metric(client, 'guardserve_faults_total{kind="out_of_memory",model="net"}') >= 3)
        assert set(outcomes) == {200}
        assert client.get("/v2/health/ready").status_code == 200
        assert counted(client) == outcomes.total()


def test_an_error_of_the_device_that_stays_makes_the_model_unready_for_as_long() -> None:
    """The batch that met it gets 500, all others 503 at once; a self-test finds out when it works again."""
    model = Faulty()
    with serving(model) as client:
        with load(client) as outcomes:
            assert client.post(INFER, json=body(DEVICE)).status_code == 500
            assert client.get("/v2/health/ready").status_code == 503
            assert "CUDA error" in client.get("/v2/health/ready").json()["error"]
            time.sleep(1.5)
            assert client.get("/v2/health/ready").status_code == 503, "a self-test fails as the requests did"
            assert metric(client, 'guardserve_faults_total{kind="device_error",model="net"}') >= 1
            model.broken = False
            wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert set(outcomes) <= {200, 500, 503}
        assert counted(client) == outcomes.total() + 1
        assert metric(client, 'guardserve_recoveries_total{model="net"}') == 1


def test_a_known_example_that_is_answered_differently_makes_the_model_unready_under_load_too() -> None:
    """Wrong answers end as soon as a self-test sees one, though requests always wait; right ones begin again."""
    model = Faulty()
    with serving(model, self_test_interval=0.1) as client:
        with load(client):
            time.sleep(0.5)
            assert metric(client, 'guardserve_faults_total{kind="self_test",model="net"}') == 0
        with load(client, right=False) as outcomes:
            nn.init.constant_(model.factor, 2.1)
            wait_until(lambda: client.get("/v2/health/ready").status_code == 503)
            assert "of a known example is not what it was" in client.get("/v2/health/ready").json()["error"]
            assert client.post(INFER, json=body(1.0)).status_code == 503
            assert metric(client, 'guardserve_faults_total{kind="self_test",model="net"}') == 1
            nn.init.constant_(model.factor, 2.0)
            wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert set(outcomes) == {200, 503}
        assert metric(client, 'guardserve_recoveries_total{model="net"}') == 1
        with load(client) as outcomes:
            pass
        assert set(outcomes) == {200}


class Jumping:
    """A wall clock that goes an hour ahead or back at each look."""

    def __init__(self) -> None:
        self._real = time.time
        self._jumps = itertools.cycle([3600.0, -3600.0, 86400.0 * 365, -86400.0, 0.0])

    def __call__(self) -> float:
        """Tell some time."""
        return self._real() + next(self._jumps)


def test_a_wall_clock_that_jumps_changes_no_deadline_no_state_and_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but time stamps comes from it."""
    monkeypatch.setattr("guardserve.watch.LOOK_INTERVAL", 0.1)
    model = Faulty()
    with serving(model, forward_timeout=1.0) as client:
        monkeypatch.setattr(time, "time", Jumping())
        wait_until(lambda: client.get("/ui/state").json()["now"]["headline"]["title"] != "Not ready")
        with load(client) as outcomes:
            looks: list[float] = []

            def goes_on() -> bool:
                looks.append(client.get("/ui/state").json()["now"]["at"])
                return len(looks) >= 12 and len(set(looks)) > 2

            wait_until(goes_on)
            model.memory = 0
            wait_until(lambda: client.get("/v2/health/ready").status_code == 503)
            model.memory = 1000
            wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
            started = time.monotonic()
            late = client.post(INFER, json=body(HANG, timeout=300_000))
            assert 0.3 <= time.monotonic() - started < 5
            assert "the request's time was over" in late.json()["error"]
            wait_until(lambda: metric(client, 'guardserve_faults_total{kind="hang",model="net"}') == 1)
            model.go_on.set()
        assert set(outcomes) <= {200, 503, 504}
        assert looks == sorted(looks)
        assert looks[-1] - looks[0] < 2 * TIMEOUT
        kinds = {event["kind"] for event in client.get("/ui/state").json()["now"]["events"]}
        assert kinds <= {"ready", "failures", "state", "alarm"}


def test_the_clock_of_what_is_remembered_goes_on_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the time of day at its beginning, whatever becomes of that."""
    began = time.time()
    clock = even_clock()
    assert clock() == pytest.approx(began, abs=1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    first = clock()
    time.sleep(0.01)
    assert 0 < clock() - first < 1
    assert first == pytest.approx(began, abs=1)


FULL_DISK = """
import functools, resource, signal, sys
import guardserve.runtime
from guardserve.cli import main
from guardserve.monitor import StateKeeper

guardserve.runtime.StateKeeper = functools.partial(StateKeeper, interval=0.1)


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


signal.signal(signal.SIGUSR1, lambda *_: limit(100))
signal.signal(signal.SIGUSR2, lambda *_: limit(resource.RLIM_INFINITY))
main(sys.argv[1:])
"""

FACTORY = """
import torch
from torch import nn

from guardserve import example_input


@example_input(input=torch.zeros(1, 3))
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 16), nn.BatchNorm1d(16))
"""


def test_a_disk_that_is_full_leaves_the_old_state_whole_and_requests_unharmed(tmp_path: Path) -> None:
    """Saving fails, is logged and counted, and goes on once there is room: what was saved before can still be read."""
    (tmp_path / "factories.py").write_text(FACTORY)
    namespace: dict[str, Any] = {}
    exec(compile(FACTORY, "factories.py", "exec"), namespace)  # noqa: S102 - our own factory
    model: nn.Module = namespace["net"]()
    profile = ReferenceProfile.fit(model, [torch.randn(300, 3)], target_arl=1000)
    profile.save(tmp_path / "profile")
    state = tmp_path / "folder" / "state"
    state.parent.mkdir()
    port = free_port()
    arguments = ["serve", "factories:net", "--reference", "profile", "--target-arl", "1000", "--port", str(port)]
    arguments += ["--state", str(state), "--drain-delay", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", FULL_DISK, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    failures = 'guardserve_state_save_failures_total{model="net"}'
    tensor = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [0.1, 0.2, 0.3]}
    try:
        wait_until(lambda: process.poll() is not None or is_ready(url))
        with httpx.Client(base_url=url, trust_env=False) as client:
            wait_until(state.exists)
            assert metric(client, failures) == 0
            process.send_signal(signal.SIGUSR1)
            wait_until(lambda: metric(client, failures) >= 1)
            saved = state.read_bytes()
            statuses = {client.post(INFER, json={"inputs": [tensor]}).status_code for _ in range(100)}
            before = metric(client, failures)
            wait_until(lambda: metric(client, failures) >= before + 2)
            assert statuses == {200}
            assert client.get("/v2/health/ready").status_code == 200
            assert state.read_bytes() == saved
            with Monitor(model.eval(), reference=profile, target_arl=1000) as monitor:
                assert monitor.load_state(state)
            process.send_signal(signal.SIGUSR2)
            wait_until(lambda: state.read_bytes() != saved)
            process.terminate()
            _, log = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert [file.name for file in state.parent.iterdir()] == ["state"], "nothing half-written is left"
    assert "state could not be saved" in log
