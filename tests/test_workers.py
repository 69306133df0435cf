"""Several processes that serve one port: real ones, under real load, with one of them killed."""

from __future__ import annotations

import http.client
import json
import math
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from idle_workers import up_once
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Exemplar
from serving import TIMEOUT, free_port, is_ready, loaded, metric, wait_until
from torch import nn
from typing_extensions import Self

from guardserve.cli import main
from guardserve.detection.merging import Summarizer
from guardserve.exceptions import GuardserveError
from guardserve.metrics import METRICS, Metrics
from guardserve.monitor import Detection, Detector, Monitor, ReferenceProfile, Summary
from guardserve.runtime import Runtime
from guardserve.totals import NO_ENGINE
from guardserve.workers import Supervisor
from guardserve.workers import rounds as rounds_module
from guardserve.workers import supervisor as supervisor_module
from guardserve.workers.families import merge
from guardserve.workers.messages import Report, Up
from guardserve.workers.pool import Pool
from guardserve.workers.sockets import bind

PROGRAM = Path(sys.executable).with_name("guardserve")

MODEL = """
import os
import time

import torch
from torch import nn

from guardserve import example_input


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        time.sleep(0.01)
        return {"normal": self.bn(x), "process": torch.full((len(x), 1), float(os.getpid()))}


@example_input(x=torch.zeros(1, 3))
def named():
    return Named()


def broken():
    raise ValueError("no such weights")


class Fails(Named):
    def forward(self, x):
        raise RuntimeError("no forward")


@example_input(x=torch.zeros(1, 3))
def failing():
    return Fails()


class Random(Named):
    def __init__(self):
        super().__init__()
        self.bn.weight = nn.Parameter(torch.rand(3))


@example_input(x=torch.zeros(1, 3))
def random():
    return Random()


# files in the working directory say what loads now
class Numbered(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("number", torch.tensor([[float(number)]]))

    def forward(self, x):
        if self.number < 0:
            raise RuntimeError("no such number")
        process = torch.full((len(x), 1), float(os.getpid()))
        return {"number": 0 * self.bn(x).sum(1, keepdim=True) + self.number, "process": process}


@example_input(x=torch.zeros(1, 3))
def numbered():
    try:
        os.rename("once", "taken")  # for whoever comes first
    except FileNotFoundError:
        with open("number") as file:
            return Numbered(file.read())
    return Numbered(-1)
"""

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}).encode()
INFER = "/v2/models/named/infer"
REQUESTS = 'guardserve_requests_total{model="named",status="200"}'
SAMPLES = 'guardserve_samples_total{model="named"}'
P_VALUES = 'guardserve_shift_p_value_count{model="named"}'
RESTARTS = "guardserve_worker_restarts_total"
UP = 'guardserve_workers{state="up"}'


@contextmanager
def workers(folder: Path, *options: str, model: str = "named") -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Serve with two workers until the block ends; give the supervisor and the port once both take connections."""
    (folder / "namedmodel.py").write_text(MODEL)
    port = free_port()
    arguments = ["serve", f"namedmodel:{model}", "--workers", "2", "--port", str(port), "--log-level", "error"]
    arguments += ["--drain-delay", "0.3", *options]
    process = subprocess.Popen([PROGRAM, *arguments], cwd=folder)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"), 2 * TIMEOUT)
        assert process.poll() is None
        wait_until(lambda: scraped(port, UP) == 2, 2 * TIMEOUT)
        yield process, port
    finally:
        process.kill()  # the workers notice
        process.wait()


def scraped(port: int, sample: str) -> float:
    """Read one sample over a connection of its own, of whichever worker takes it."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT) as client:
        return metric(client, sample)


class Load:
    """Clients that send one request after the other, each over a connection that lasts for a few."""

    def __init__(self, port: int, *, until_refused: bool = False) -> None:
        self.outcomes: Counter[str] = Counter()
        self.processes: Counter[int] = Counter()
        self.slowest = 0.0
        self._port = port
        self._until_refused = until_refused
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(6)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._until_refused:
            self._ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        """Requests that were answered well."""
        return self.outcomes["200"]

    def _run(self) -> None:
        while not self._ended.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
            try:
                connection.connect()
            except ConnectionRefusedError:
                if self._until_refused:
                    return
                self.outcomes["refused"] += 1
                continue
            with suppress(ConnectionError, http.client.HTTPException):
                self._use(connection)
            connection.close()

    def _use(self, connection: http.client.HTTPConnection) -> None:
        for _ in range(20):
            began = time.monotonic()
            outcome = "lost"
            try:
                connection.request("POST", INFER, BODY)
                response = connection.getresponse()
                answer = json.loads(response.read())
                outcome = str(response.status)
                self.processes[int(answer["outputs"][1]["data"][0])] += 1
            except TimeoutError:
                outcome = "hung"
                raise ConnectionError from None
            finally:
                self.outcomes[outcome] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.01)  # leave a new worker something of the processors
            if self._ended.is_set() or response.getheader("connection") == "close":
                return


def test_two_workers_answer_as_one_and_survive_the_death_of_one(tmp_path: Path) -> None:
    """Both answer; one scrape sums them up; a killed one costs its requests in flight, is replaced, and stays counted.

    Then SIGTERM under load: each accepted request is answered, and the status is 0.
    """
    with workers(tmp_path) as (supervisor, port):
        with Load(port) as load:
            wait_until(lambda: len(load.processes) == 2)
            wait_until(lambda: load.answered >= 100)
        assert set(load.outcomes) == {"200"}
        wait_until(
            lambda: scraped(port, REQUESTS) == load.answered
        )  # one that was busy may have been waited for no more
        for _ in range(3):  # whoever answers
            assert scraped(port, REQUESTS) == load.answered
        wait_until(lambda: scraped(port, SAMPLES) == load.answered)  # monitors are looked at now and then
        assert scraped(port, 'guardserve_request_duration_seconds_bucket{le="+Inf",model="named"}') == load.answered
        assert scraped(port, RESTARTS) == 0

        victim = next(iter(load.processes))
        os.kill(victim, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert scraped(port, REQUESTS) == load.answered, "what a worker that hangs had told counts"
            assert time.monotonic() < began + 5
        finally:
            os.kill(victim, signal.SIGCONT)

        counts = [float(load.answered)]
        with Load(port) as more:
            wait_until(lambda: len(more.processes) == 2)
            victim = more.processes.most_common(1)[0][0]
            counts.append(scraped(port, REQUESTS))
            os.kill(victim, signal.SIGKILL)
            died = time.monotonic()
            while (restarts := scraped(port, RESTARTS)) == 0 and time.monotonic() < died + 2 * TIMEOUT:
                counts.append(scraped(port, REQUESTS))
                time.sleep(0.1)
            while (scraped(port, UP) < 2 or len(more.processes) < 3) and time.monotonic() < died + 2 * TIMEOUT:
                counts.append(scraped(port, REQUESTS))
                time.sleep(0.1)
        assert restarts == 1
        assert len(more.processes) == 3, "the new worker takes its part"
        assert counts == sorted(counts)
        assert more.outcomes["hung"] == more.outcomes["refused"] == 0
        assert set(more.outcomes) <= {"200", "lost", "hung", "refused"}
        assert more.outcomes["lost"] <= 6, "only what the dead worker had in flight, at most one a client"
        # what the dead one answered after its last report is forgotten, and nothing else
        assert scraped(port, REQUESTS) <= load.answered + more.answered

        with Load(port, until_refused=True) as last:
            wait_until(lambda: last.answered >= 50)
            supervisor.send_signal(signal.SIGTERM)
            assert supervisor.wait(TIMEOUT) == 0
        assert set(last.outcomes) == {"200"}


def test_a_hang_up_of_the_whole_group_ends_no_process_that_is_starting(tmp_path: Path) -> None:
    """As when the terminal is closed from which the server was started: the first process heeds it, and none dies."""
    (tmp_path / "namedmodel.py").write_text(MODEL)
    port = free_port()
    arguments = ["serve", "namedmodel:named", "--workers", "2", "--port", str(port), "--drain-delay", "0"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, *arguments], cwd=tmp_path, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or b"2 workers for" in (tmp_path / "log").read_bytes())
        for _ in range(3):
            time.sleep(0.2)
            os.killpg(process.pid, signal.SIGHUP)
        wait_until(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"), 2 * TIMEOUT)
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert "by SIGHUP" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def layer() -> nn.Module:
    """Return the one BatchNorm layer of the model that workers serve."""
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(3))).eval()


def fit(mean: float = 0.0) -> ReferenceProfile:
    """Make a small profile of it."""
    samples = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + mean
    return ReferenceProfile.fit(layer(), [samples], target_arl=1000)


@pytest.fixture(scope="module")
def profile() -> ReferenceProfile:
    """Return a profile of standard normal samples."""
    return fit()


def test_a_detector_judges_what_all_workers_have_seen_and_outlives_them(
    tmp_path: Path, profile: ReferenceProfile
) -> None:
    """Its alarm, state and file are those of all samples; without their supervisor, workers end by themselves."""
    profile.save(tmp_path / "profile.safetensors")
    options = ("--reference", "profile.safetensors", "--state", "state.safetensors", "--target-arl", "1000")
    with workers(tmp_path, *options) as (supervisor, port):
        seen: Counter[int] = Counter()
        rng = random.Random(0)

        def send(rows: int, mean: float) -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT) as client:
                data = [rng.gauss(mean, 1) for _ in range(3 * rows)]
                tensor = {"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": data}
                answer = client.post(INFER, json={"inputs": [tensor]}).raise_for_status().json()
                seen[int(answer["outputs"][1]["data"][0])] += rows

        while sum(seen.values()) < 160 or len(seen) < 2:
            send(4, 0.0)
        wait_until(lambda: scraped(port, P_VALUES) == sum(seen.values()))
        assert scraped(port, 'guardserve_shift_state{model="named",state="shifted"}') == 0
        while len(seen) < 2 or sum(seen.values()) < 400:
            send(4, 3.0)
        wait_until(lambda: scraped(port, 'guardserve_shift_state{model="named",state="shifted"}') == 1)
        wait_until(lambda: scraped(port, P_VALUES) == sum(seen.values()))
        for _ in range(4):  # whoever answers
            assert scraped(port, 'guardserve_shift_alarms_total{model="named"}') == 1
            assert scraped(port, 'guardserve_shift_lead_layer{layer="bn",model="named"}') == 1
            assert scraped(port, 'guardserve_shift_score{model="named"}') > 1
        supervisor.kill()
        wait_until(lambda: not any(map(is_alive, seen)))


def is_alive(process: int) -> bool:
    """Tell whether there is such a process, which is not only waited for."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def numbers(port: int) -> dict[int, tuple[float, str]]:
    """Return what each worker's version is, by its process: its number, and what its answers call it."""
    found: dict[int, tuple[float, str]] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(found) < 2 and time.monotonic() < deadline:
        answer = (
            httpx.post(
                f"http://127.0.0.1:{port}/v2/models/numbered/infer", content=BODY, trust_env=False, timeout=TIMEOUT
            )
            .raise_for_status()
            .json()
        )
        number, process = (output["data"][0] for output in answer["outputs"])
        found[int(process)] = number, answer["model_version"]
    return found


def test_all_workers_load_the_model_again_or_none_does(tmp_path: Path) -> None:
    """By a call to one of them, which says what happened, or by a signal; while one version fails, all keep theirs.

    A worker that is started again, but with a model that fails its probe, takes nothing until there is a better one;
    with another one than the others have, until they take that too.
    """
    (tmp_path / "number").write_text("1")
    with (
        workers(tmp_path, model="numbered") as (supervisor, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=2 * TIMEOUT) as client,
    ):
        load = "/v2/repository/models/numbered/load"
        url = f"http://127.0.0.1:{port}/v2/models/numbered/infer"
        first = numbers(port)
        assert {number for number, _ in first.values()} == {1.0}

        (tmp_path / "number").write_text("2")
        answer = client.post(load)
        assert answer.status_code == 200, answer.text
        second = numbers(port)
        assert set(second) == set(first), "no process was started again"
        assert set(second.values()) == {(2.0, answer.json()["version"])}

        (tmp_path / "number").write_text("3")
        (tmp_path / "once").touch()  # one of the two gets a model that fails its probe
        answer = client.post(load)
        assert answer.status_code == 422
        assert "no such number" in answer.json()["error"]
        assert numbers(port) == second

        answer = client.post("/v2/repository/models/another/load")
        assert answer.status_code == 404
        supervisor.send_signal(signal.SIGHUP)
        wait_until(lambda: {number for number, _ in numbers(port).values()} == {3.0}, 2 * TIMEOUT)
        assert set(numbers(port)) == set(first)
        wait_until(lambda: scraped(port, 'guardserve_reloads_total{model="numbered",outcome="done"}') == 4)
        assert scraped(port, 'guardserve_reloads_total{model="numbered",outcome="failed"}') == 2

        (tmp_path / "number").write_text("-1")
        killed = next(iter(first))
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: scraped(port, RESTARTS) >= 2)  # the next one has failed its probe by then
        assert scraped(port, 'guardserve_workers{state="down"}') == 1
        answers = [httpx.post(url, content=BODY, trust_env=False, timeout=TIMEOUT) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}, "it takes no connection"
        (tmp_path / "number").write_text("3")
        wait_until(lambda: scraped(port, UP) == 2, 2 * TIMEOUT)
        assert {number for number, _ in numbers(port).values()} == {3.0}

        (tmp_path / "number").write_text("4")
        os.kill((set(first) - {killed}).pop(), signal.SIGKILL)
        wait_until(lambda: scraped(port, 'guardserve_workers{state="held"}') == 1, 2 * TIMEOUT)
        answers = [httpx.post(url, content=BODY, trust_env=False, timeout=TIMEOUT) for _ in range(20)]
        assert {answer.json()["outputs"][0]["data"][0] for answer in answers} == {3.0}
        supervisor.send_signal(signal.SIGHUP)
        wait_until(lambda: scraped(port, UP) == 2, 2 * TIMEOUT)
        assert {number for number, _ in numbers(port).values()} == {4.0}


REASONS = {
    "broken": "no such weights",
    "failing": "no forward",
    "random": "made at random needs a seed, or --weights",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Start workers of every model that cannot be served, all at once; return statuses and errors."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "namedmodel.py").write_text(MODEL)
    options = ["--workers", "2", "--port", "0", "--log-level", "error"]
    with ExitStack() as stack:
        started = {}
        for model in REASONS:
            errors = stack.enter_context((folder / model).open("w"))
            command = [str(PROGRAM), "serve", f"namedmodel:{model}", *options]
            started[model] = stack.enter_context(subprocess.Popen(command, cwd=folder, stderr=errors))
            stack.callback(started[model].kill)
        return {model: (process.wait(2 * TIMEOUT), (folder / model).read_text()) for model, process in started.items()}


@pytest.mark.parametrize("model", REASONS)
def test_workers_that_cannot_start_end_the_command_with_their_reason(
    ended: dict[str, tuple[int, str]], model: str
) -> None:
    """The status is not 0, and one line says why: also of a model that fails its probe or is made at random."""
    status, errors = ended[model]
    assert status == 1
    assert REASONS[model] in errors
    assert "Traceback" not in errors or model == "failing", "of a forward it is in the log"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grpc-port", "0"], "--grpc-port does not work with --workers 2"),
        (["--reference-from-traffic", "200"], "--reference-from-traffic does not work with --workers 2"),
        (["--reference-from-traffic", "200", "--state", "s"], "make the profile with guardserve reference"),
        (["--host", "192.0.2.1", "--allow-anonymous"], "cannot listen on 192.0.2.1"),
        (["--host", "192.0.2.1"], "there is no API key"),
    ],
)
def test_what_several_workers_cannot_do_is_refused_before_they_start(options: list[str], says: str) -> None:
    """Each error names the option and the remedy."""
    result = CliRunner().invoke(main, ["serve", "demo", "--workers", "2", *options])
    assert result.exit_code == 1
    assert says in result.output


def test_all_workers_take_the_api_keys_that_were_there_at_the_start(tmp_path: Path) -> None:
    """One that is started again reads no file that has changed: which keys open would depend on who answers."""
    path = tmp_path / "keys"
    path.write_text("first-key-of-the-file\n")
    options = ["--workers", "2", "--port", "0", "--api-key-file", str(path)]
    with mock.patch.object(Supervisor, "run", autospec=True) as run:
        result = CliRunner().invoke(
            main, ["serve", "demo", *options], env={"GUARDSERVE_API_KEYS": "key-of-environment"}
        )
    assert result.exit_code == 0, result.output
    (supervisor,) = run.call_args.args
    for sock in supervisor._sockets:
        sock.close()
    _, settings = supervisor._arguments
    assert settings.api_keys == ("key-of-environment", "first-key-of-the-file")
    assert settings.api_key_file is None


def test_sockets_of_several_addresses_share_a_port_and_refuse_until_somebody_listens() -> None:
    """A free port is the same for all; a taken one is an error that names it."""
    sockets = bind("localhost", 0)
    try:
        (port,) = {sock.getsockname()[1] for sock in sockets}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        sockets[0].listen()
        with pytest.raises(GuardserveError, match=f"cannot listen on localhost:{port}"):
            bind("localhost", port)
    finally:
        for sock in sockets:
            sock.close()


def families(counts: dict[str, int], gauges: dict[str, float], exemplar: Exemplar | None = None) -> list[Metric]:
    """Make an exposition of one counter, and gauges."""
    counter = CounterMetricFamily("c", "help", labels=["l"])
    for label, count in counts.items():
        counter.add_metric([label], count, exemplar=exemplar)
    return [counter, *(GaugeMetricFamily(name, "help", value=value) for name, value in gauges.items())]


def values(merged: list[Metric]) -> dict[tuple[str, ...], float]:
    """Return samples by name and labels."""
    return {(one.name, *one.labels.values()): one.value for family in merged for one in family.samples}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 10**9)), min_size=1, max_size=5))
def test_counters_add_up_in_any_order_and_what_is_retained_goes_on_to_count(parts: list[dict[str, int]]) -> None:
    """Merging is a sum over processes, also where each knows other labels, and where some have ended."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    expected = {("c_total", label): count for label, count in total.items()}
    assert values(merge(families(part, {}) for part in parts)) == expected
    assert values(merge(families(part, {}) for part in reversed(parts))) == expected
    pool = Pool()
    first, *others = parts
    pool.retain(Report(None, families(first, {"guardserve_queue_size": 3})))
    merged = pool.families(
        [Report(1, families(part, {})) for part in others], {"up": len(others), "held": 2, "down": 1}, 7, 0
    )
    shown = values(merged)
    assert {key: shown[key] for key in expected} == expected
    assert ("guardserve_queue_size",) not in shown
    assert shown["guardserve_workers", "up"] == len(others)
    assert shown["guardserve_workers", "held"] == 2
    assert shown["guardserve_workers", "down"] == 1
    assert shown["guardserve_worker_restarts_total",] == 7


def test_gauges_follow_their_rules_and_the_later_exemplar_stays() -> None:
    """Amounts add up, readiness is the least, the rest the most."""
    early, late = Exemplar({"id": "a"}, 1.0, 10.0), Exemplar({"id": "b"}, 1.0, 20.0)
    names = [f"guardserve_{name}" for name in ("requests_in_flight", "model_ready", "monitor_share")]
    names += ["process_open_fds", "process_start_time_seconds", "python_info"]
    merged = merge(
        [
            families({"a": 1}, dict(zip(names, (1, 1, 0.1, 5, 100, 1), strict=True)), late),
            families({"a": 1}, dict(zip(names, (2, 0, 0.3, 6, 90, 1), strict=True)), early),
        ]
    )
    shown = values(merged)
    assert [shown[name,] for name in names] == [3, 0, 0.3, 11, 90, 1]
    assert merged[0].samples[0].exemplar == late
    assert {description.pooled for description in METRICS.values()} == {"sum", "max", "min"}


def test_requests_that_were_refused_without_a_worker_are_those_of_the_model() -> None:
    """Beside what its workers have counted; the series are there before the first, lest an increase be missed."""
    runtime = Runtime(loaded(layer(), name="named"))
    metrics = Metrics(runtime)
    metrics.follow(runtime, mock.Mock(counts=NO_ENGINE), "1")
    metrics.request_ended(503, 0.1, "not_ready")
    metrics.request_ended(200, 0.1)
    report = Report(1, list(metrics.registry.collect()))
    for refused in (0, 4):
        found = [one for family in Pool().families([report], {"up": 1}, 0, refused) for one in family.samples]
        shown = {tuple(one.labels.values()): one.value for one in found if one.name == "guardserve_requests_total"}
        assert shown == {("named", "200"): 1, ("named", "503"): 1 + refused}
        errors = {one.labels["reason"]: one.value for one in found if one.name == "guardserve_request_errors_total"}
        assert errors["not_ready"] == sum(errors.values()) == 1 + refused
    runtime.close()


def test_the_window_of_several_monitors_is_that_of_one_that_saw_all() -> None:
    """The most recent parts count, whosever they are; what they show together is judged as one window."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.BatchNorm1d(3)).eval() for _ in range(3)]
    stale, fresh = torch.randn(64, 3) + 5, torch.randn(96, 3)
    with ExitStack() as stack:
        one, other, whole = (
            stack.enter_context(Monitor(model, window=64, min_samples=32, values=None)) for model in models
        )
        models[0](stale)
        one.snapshot()
        for i in range(6):
            for monitor, model, start in ((one, models[0], 8 * i), (other, models[1], 48 + 8 * i)):
                model(fresh[start : start + 8])
                monitor.snapshot()
                models[2](fresh[start : start + 8])
        pool = Pool(window=64)
        since = pool.since([Report(1, [], "v", *monitor.window(-math.inf)) for monitor in (one, other)])
        reports = [Report(1, [], "v", *monitor.window(since)) for monitor in (one, other)]
        seen = pool.seen([*reports, Report(1, [], "another", [], reports[0].seen)], "v")
        verdict, expected = Monitor(models[2], window=64, min_samples=32).judge(seen, None), whole.verdict()
    assert verdict.window.samples == seen.samples == 64
    assert (verdict.state, expected.state) == ("ok", "ok")
    assert whole.snapshot(recent=True).samples == 64
    assert verdict.score == pytest.approx(expected.score)
    assert one.verdict().state == "shifted", "by itself it remembers for longer"


def test_what_detectors_add_up_is_what_one_makes_of_all_their_samples(
    tmp_path: Path, profile: ReferenceProfile
) -> None:
    """Two monitors' summaries give a pool's detector the state that one has which saw all; another profile is read."""
    torch.manual_seed(0)
    path, state = tmp_path / "profile", tmp_path / "state"
    profile.save(path)
    pool = Pool(reference=path, target_arl=1000, state=state)
    copies = [layer(), layer()]
    with ExitStack() as stack:
        monitors = [stack.enter_context(Monitor(one, reference=profile, target_arl=1000)) for one in copies]
        assert [monitor.take_summary() for monitor in monitors] == [None, None]
        for shift in (0.0, 4.0):
            for one in copies:
                one(torch.randn(150, 3) + shift)
            reports = [Report(1, [], "v", summaries=summaries(monitor)) for monitor in monitors]
            pool.judge(reports)
            assert detected(pool).state == ("shifted" if shift else "ok")
        assert (detected(pool).samples, detected(pool).alarms) == (600, 1)
        pool.save()
        assert Pool(reference=path, target_arl=1000, state=state).detection == pool.detection
        reports = [Report(1, [], "v", summaries=summaries(monitor)) for monitor in monitors]
        assert not any(report.summaries for report in reports), "nothing is told twice"

    another = fit(4.0)
    summary = Summary.of(another, torch.zeros(1, 6).numpy(), [0])
    pool.judge([Report(1, [], "v", summaries=[summary])])
    assert detected(pool).samples == 600, "it is not there yet"
    another.save(path)
    pool.judge([Report(1, [], "v", summaries=[summary])])
    assert (detected(pool).samples, detected(pool).alarms) == (1, 1), "another detector, and no count goes back"


def summaries(monitor: Monitor) -> list[Summary]:
    """Return what a worker reports of its monitor."""
    summary = monitor.take_summary()
    return [] if summary is None else [summary]


def detected(pool: Pool) -> Detection:
    """Return what a pool's detector makes of what it has seen."""
    assert pool.detection is not None
    return pool.detection


def test_a_summarizer_adds_up_what_a_summary_of_the_features_is(profile: ReferenceProfile) -> None:
    """Second by second, with those that cannot be judged."""
    features = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    features[7, 2] = np.nan
    clock = iter([5.0, 5.5, 6.0, 7.9])  # of the four chunks
    detector = Detector(profile, 1000)
    detector.summarizer = Summarizer(profile, lambda: next(clock))
    detector.judge(features)
    summary = detector.summarizer.take()
    expected = Summary.of(profile, features, [5] * 64 + [6] * 32 + [7] * 4)
    assert summary is not None
    assert summary.digest == expected.digest
    for name in ("intervals", "samples", "nonfinite", "features", "vectors", "oddness"):
        np.testing.assert_allclose(getattr(summary, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_a_worker_that_says_nothing_is_ended_and_one_that_cannot_start_again_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for either: the one is replaced, and after some attempts the supervisor gives up."""
    before = signal.getsignal(signal.SIGTERM)
    for name, value in {"SILENCE": 0.3, "ATTEMPTS": 3, "BACKOFF": 0.01}.items():
        monkeypatch.setattr(supervisor_module, name, value)
    for name in ("POLL_INTERVAL", "PATIENCE"):
        monkeypatch.setattr(rounds_module, name, 0.1)
    starts = tmp_path / "starts"
    arguments = (pickle.dumps(Up()), starts, 60.0)
    supervisor = Supervisor(up_once, arguments, sockets=[], workers=1, pool=Pool(), timeout=1)
    with pytest.raises(GuardserveError, match="worker 1 ended with status 3 before it was up"):
        supervisor.run()
    assert starts.read_text() == "...."
    assert "worker 1 does not report any more: it is killed" in caplog.text
    waits = re.findall(r"started again in ([\d.]+) s", caplog.text)
    assert len(waits) == 3
    assert "worker 1 has ended by SIGKILL: it is started again" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before, "handlers are given back"
