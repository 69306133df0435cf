"""What workers and their supervisor make of each other's messages, one by one and without processes."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from prometheus_client.core import CounterMetricFamily, Metric
from serving import loaded, wait_until
from torch import nn

from guardserve import Monitor, ReferenceProfile
from guardserve.exceptions import GuardserveError
from guardserve.loading.imported import ImportedCode
from guardserve.metrics import Metrics
from guardserve.monitor import Seen
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.versions import ReloadError, ReloadRunningError
from guardserve.totals import NO_ENGINE
from guardserve.workers import Link, Pool, Supervisor
from guardserve.workers import worker as worker_module
from guardserve.workers.admission import Admission
from guardserve.workers.contents import MODEL, PREPROCESSING, PROFILE
from guardserve.workers.messages import (
    Collect,
    Decide,
    Decided,
    Hurry,
    Line,
    Listen,
    Outcome,
    Pooled,
    Prepare,
    Prepared,
    Ready,
    Reload,
    Report,
)
from guardserve.workers.reloading import Reloading
from guardserve.workers.worker import Worker, limit

ENGINE = mock.Mock(counts=NO_ENGINE)
"""One that has met nothing."""


class Net(nn.Module):
    """One BatchNorm layer."""

    def __init__(self, number: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.number = nn.Parameter(torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        y: torch.Tensor = self.bn(x) + self.number
        return y


class Crew:
    """Workers without processes: what each is told can be read, and what it says is given to the reloading."""

    def __init__(self, count: int = 2) -> None:
        self.workers = [Worker(number) for number in range(1, count + 1)]
        self.ends: dict[Worker, Connection] = {}
        for worker in self.workers:
            self.start(worker)
            worker.loaded, worker.admitted = {MODEL: "v1"}, True
        self.reloading = Reloading(self.workers)
        self.admission = Admission(self.workers, self.reloading)

    def start(self, worker: Worker) -> None:
        """Let a worker begin to start."""
        mine, self.ends[worker] = Pipe()
        worker.process, worker.line = mock.Mock(), Line(mine)

    def restart(self, worker: Worker) -> None:
        """Let a worker end, and another begin in its place."""
        worker.forget()
        self.start(worker)

    def is_ready(self, worker: Worker, version: str, **loaded: str) -> None:
        """Let a worker be ready with a version."""
        worker.loaded = {MODEL: version, **loaded}
        self.admission.go_on()

    def told(self, worker: Worker) -> list[Any]:
        """Return what a worker was told since the last look."""
        found = []
        while self.ends[worker].poll():
            found.append(Line(self.ends[worker]).receive())
        return found

    def all_told(self) -> list[list[Any]]:
        """Return what each worker was told since the last look."""
        return [self.told(worker) for worker in self.workers]


def test_all_workers_commit_when_all_have_the_same_version_and_then_the_answer_is_given() -> None:
    """Nobody is told to before, and the one that was asked hears of it when all have done so."""
    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin((one, 7))
    assert crew.all_told() == [[Prepare(1)]] * 2
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2"}))
    assert crew.all_told() == [[], []]
    crew.reloading.hear(two, Prepared(1, {MODEL: "v2"}))
    assert crew.all_told() == [[Decide(1, commit=True)]] * 2
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    assert crew.all_told() == [[], []]
    crew.reloading.hear(two, Decided(1, {MODEL: "v2"}))
    assert crew.all_told() == [[Outcome(7)], []]
    assert crew.reloading.ends_by is None


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (Prepared(1, failure="its probe failed"), "its probe failed"),
        (Prepared(1, {MODEL: "v3"}), "the workers differ in the model, as files have changed meanwhile: try again"),
        (Prepared(1, {MODEL: "v2", PROFILE: "b"}), "differ in the reference profile, as"),
        (Prepared(1, {MODEL: "v2", "package net": "2"}), "differ in package net, as"),
    ],
)
def test_no_worker_commits_when_one_has_another_version_or_none(second: Prepared, why: str) -> None:
    """Each drops what it has loaded; the answer says why, and the next try is a new one."""
    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin((two, 1))
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2", PROFILE: "a", "package net": "1"}))
    crew.reloading.hear(two, second)
    assert crew.all_told() == [[Prepare(1), Decide(1, commit=False)]] * 2
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    crew.reloading.hear(two, Decided(1, {MODEL: "v2"}))
    told_one, (outcome,) = crew.all_told()
    assert told_one == []
    assert outcome.ticket == 1
    assert why in outcome.failure
    crew.reloading.begin()
    assert crew.all_told() == [[Prepare(2)]] * 2
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2"}))  # of the try before
    crew.reloading.hear(two, Prepared(2, {MODEL: "v2"}))
    assert crew.all_told() == [[], []]


def test_a_worker_that_ends_while_it_loads_keeps_the_others_from_it() -> None:
    """It may be what it loaded that ended it; one that ends later changes nothing, nor does one that had asked."""
    crew = Crew(3)
    one, two, three = crew.workers
    crew.reloading.begin((one, 1))
    crew.reloading.hear(two, Prepared(1, {MODEL: "v2"}))
    three.forget()
    crew.reloading.lose(three)
    one.forget()
    crew.reloading.lose(one)
    assert crew.told(two) == [Prepare(1), Decide(1, commit=False)]
    crew.reloading.hear(two, Decided(1, {MODEL: "v2"}))
    assert crew.reloading.ends_by is None

    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin((one, 1))
    for worker in crew.workers:
        crew.reloading.hear(worker, Prepared(1, {MODEL: "v2"}))
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    two.forget()
    crew.reloading.lose(two)
    assert crew.told(one) == [Prepare(1), Decide(1, commit=True), Outcome(1)]


def test_whoever_asks_meanwhile_is_told_so() -> None:
    """And once it is over, it is done once more for signals that came meanwhile."""
    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin((one, 1))
    crew.reloading.begin((two, 5))
    crew.reloading.begin()
    assert crew.told(one) == [Prepare(1)]
    prepare, outcome = crew.told(two)
    assert (prepare, outcome.ticket, outcome.running) == (Prepare(1), 5, True)
    crew.reloading.begin()
    for number in (1, 2):
        for message in (Prepared, Decided):
            for worker in crew.workers:
                crew.reloading.hear(worker, message(number, {MODEL: "v2"}))
        assert Prepare(number + 1) in crew.told(two) or number == 2
    assert not crew.reloading.running


def test_a_worker_that_is_starting_is_left_to_get_ready_however_often_the_model_is_loaded_again() -> None:
    """It takes no part, and answers if it has loaded what the others have by then."""
    crew = Crew()
    one, two = crew.workers
    crew.restart(two)
    process: Any = two.process
    for number in (1, 2, 3):
        crew.reloading.begin()
        assert crew.all_told() == [[Prepare(number)], []]
        crew.reloading.hear(one, Prepared(number, {MODEL: "v2"}))
        crew.reloading.hear(one, Decided(number, {MODEL: "v2"}))
        assert crew.all_told() == [[Decide(number, commit=True)], []]
    crew.is_ready(two, "v2")
    assert crew.told(two) == [Listen()]
    process.kill.assert_not_called()


def test_a_worker_that_began_before_the_model_was_loaded_again_starts_anew_once_if_that_shows() -> None:
    """Not held back, as it is the one with the old files; what it has after that counts. Nor is it killed twice."""
    crew = Crew()
    one, two = crew.workers
    two.starts = one.starts = 1
    crew.restart(two)
    process: Any = two.process
    crew.reloading.begin()
    crew.is_ready(two, "v1")
    process.kill.assert_not_called()
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2"}))
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    crew.admission.go_on()
    crew.reloading.begin()
    crew.reloading.hear(one, Prepared(2, failure="no memory"))
    crew.reloading.hear(one, Decided(2, {MODEL: "v2"}))
    crew.admission.go_on()
    process.kill.assert_called_once()
    assert (two.renewed, two.held, crew.told(two)) == (True, False, [])
    two.starts += 1
    for version, told in (("v3", []), ("v2", [Listen()])):
        crew.restart(two)
        crew.reloading.lose(two)
        crew.is_ready(two, version)
        assert (crew.told(two), two.held) == (told, not told)


def test_workers_of_which_none_answers_start_anew_when_they_are_ready(caplog: pytest.LogCaptureFixture) -> None:
    """What the one has read and the other has not would differ; nothing is waited for, and what comes then is taken."""
    crew = Crew()
    for worker in crew.workers:
        crew.restart(worker)
    processes = [cast("mock.Mock", worker.process) for worker in crew.workers]
    for _ in range(3):
        crew.reloading.begin()
    assert (crew.reloading.running, crew.reloading.ends_by, crew.all_told()) == (False, None, [[], []])
    for worker, process in zip(crew.workers, processes, strict=True):
        process.kill.assert_not_called()
        crew.is_ready(worker, "v1")
        process.kill.assert_called_once()
    assert caplog.messages == [f"worker {n} starts anew, with what the files hold now" for n in (1, 2)]
    for worker in crew.workers:
        crew.restart(worker)
        crew.is_ready(worker, "v2")
        assert crew.told(worker) == [Listen()]


def test_a_worker_that_has_started_anew_answers_however_often_the_model_is_loaded_again() -> None:
    """Once; then it loads what the files hold by then, while it answers. The next time it starts anew again."""
    crew = Crew()
    one, two = crew.workers
    for number in (1, 2):
        for worker in crew.workers:
            crew.restart(worker)
        for starts in (1, 2):
            crew.reloading.begin()
            crew.is_ready(one, "v1")
            assert (one.ending, crew.reloading.running) == ((True, False) if starts == 1 else (False, True))
            assert crew.told(one) == ([] if starts == 1 else [Listen(), Prepare(number)])
            if starts == 1:
                crew.restart(one)
        crew.is_ready(two, "v2")
        assert crew.told(two) == [], "not before it is known what the other has"
        crew.reloading.hear(one, Prepared(number, {MODEL: "v2"}))
        crew.reloading.hear(one, Decided(number, {MODEL: "v2"}))
        crew.admission.go_on()
        assert crew.all_told() == [[Decide(number, commit=True)], [Listen()]]


def test_a_worker_that_is_being_ended_is_not_what_others_have_to_be_like() -> None:
    """It answers nobody any more, nor is it asked to load its model again, or started anew at once for that."""
    crew = Crew()
    one, two = crew.workers
    process: Any = one.process
    one.end("does not report any more")
    crew.restart(two)
    crew.is_ready(two, "v2")
    assert (crew.told(two), two.held) == ([Listen()], False)
    crew.reloading.begin()
    assert crew.all_told() == [[], [Prepare(1)]]
    process.kill.assert_called_once()
    assert not one.renewed


def test_when_all_workers_end_while_they_load_the_model_nobody_has_loaded_it(caplog: pytest.LogCaptureFixture) -> None:
    """Also where that is not known yet when they are told."""
    crew = Crew()
    for worker in crew.workers:
        crew.ends[worker].close()
    crew.reloading.begin()
    assert not crew.reloading.running
    assert "no worker is left" in caplog.text


def test_a_worker_that_has_loaded_something_else_than_the_others_is_held_back(caplog: pytest.LogCaptureFixture) -> None:
    """The log says once what and what to do; it starts anew when the model is loaded again, and answers with it."""
    crew = Crew()
    one, two = crew.workers
    crew.restart(two)
    crew.is_ready(two, "v2")
    crew.admission.go_on()
    assert (crew.told(two), two.held) == ([], True)
    (message,) = caplog.messages
    assert "worker 2 is ready, but held back" in message
    assert "the model (v2, not v1)" in message
    assert f"send SIGHUP to process {os.getpid()}" in message

    process: Any = two.process
    crew.reloading.begin()
    assert crew.all_told() == [[Prepare(1)], []]
    process.kill.assert_called_once()
    crew.admission.go_on()
    crew.restart(two)
    crew.reloading.lose(two)
    crew.is_ready(two, "v2")
    assert crew.told(two) == [], "the others answer with what they had still"
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2"}))
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    crew.admission.go_on()
    assert crew.told(two) == [Listen()]


@pytest.mark.parametrize(
    ("mine", "theirs", "says"),
    [
        ({}, {}, None),
        ({"the code of late": "b"}, {"the code of early": "a"}, None),
        ({"the code of net": "b"}, {"the code of net": "a"}, "the code of net; .*: start the server again, or"),
        ({"package torch": "3 b"}, {"package torch": "2 a"}, "package torch; .*: start the server again, or"),
        ({PROFILE: "b"}, {PROFILE: "a"}, "the reference profile; .* send SIGHUP"),
        ({PREPROCESSING: "b"}, {PREPROCESSING: "a"}, "the image preprocessing; .* send SIGHUP"),
    ],
)
def test_a_worker_is_held_back_by_other_code_or_another_profile_too(
    mine: dict[str, str], theirs: dict[str, str], says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by code that only one of them has needed so far."""
    crew = Crew()
    one, two = crew.workers
    one.loaded = {MODEL: "v1", **theirs}
    crew.restart(two)
    crew.is_ready(two, "v1", **mine)
    assert two.held == (says is not None)
    assert says is None or re.search(says, caplog.text)
    assert crew.told(two) == ([Listen()] if says is None else [])


def test_each_worker_has_to_be_like_each_other_and_not_only_like_the_first() -> None:
    """Of three, one may lack code in which the other two differ."""
    crew = Crew(3)
    one, two, three = crew.workers
    two.loaded = {MODEL: "v1", "package lazy": "1"}
    crew.restart(three)
    crew.is_ready(three, "v1", **{"package lazy": "2"})
    assert three.held
    three.admitted = True
    crew.reloading.begin()
    for worker, lazy in ((one, {}), (two, {"package lazy": "1"}), (three, {"package lazy": "2"})):
        crew.reloading.hear(worker, Prepared(1, {MODEL: "v2", **lazy}))
    assert [told[-1] for told in crew.all_told()] == [Decide(1, commit=False)] * 3


def test_a_model_that_is_another_each_time_is_refused_when_workers_first_start() -> None:
    """No second worker would ever answer; files that are replaced later are no reason to end."""
    crew = Crew()
    one, two = crew.workers
    crew.restart(two)
    one.starts = two.starts = 1
    with pytest.raises(GuardserveError, match=r"workers 1 and 2 .* the model \(v2, not v1\)\. .* a seed, or --weights"):
        crew.is_ready(two, "v2")
    assert crew.told(two) == []
    two.starts = 2
    crew.admission.go_on()
    assert two.held


def test_a_worker_that_is_held_back_answers_when_nobody_else_does(caplog: pytest.LogCaptureFixture) -> None:
    """Another version is better than none; from then on it is the others that have to be like it."""
    crew = Crew(3)
    one, two, three = crew.workers
    for worker, version in ((two, "v2"), (three, "v3")):
        crew.restart(worker)
        crew.is_ready(worker, version)
    assert two.held
    assert three.held
    crew.restart(one)
    crew.admission.go_on()
    assert (crew.told(two), two.held) == ([Listen()], False)
    assert "worker 2 answers: no worker that has loaded anything else is left" in caplog.text
    assert (crew.told(three), three.held) == ([], True)
    crew.is_ready(one, "v2")
    assert crew.told(one) == [Listen()]


def test_a_worker_that_did_not_take_the_new_version_is_ended() -> None:
    """The others have it, and nobody would know."""
    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin()
    for worker in crew.workers:
        crew.reloading.hear(worker, Prepared(1, {MODEL: "v2"}))
    crew.reloading.hear(one, Decided(1, {MODEL: "v2"}))
    crew.reloading.hear(two, Decided(1, {MODEL: "v1"}))
    healthy, stuck = (cast("mock.Mock", worker.process) for worker in crew.workers)
    stuck.kill.assert_called_once()
    healthy.kill.assert_not_called()


def test_a_worker_that_never_says_what_came_of_it_is_ended() -> None:
    """Its end lets the others go on."""
    crew = Crew()
    one, two = crew.workers
    crew.reloading.begin()
    crew.reloading.hear(one, Prepared(1, {MODEL: "v2"}))
    assert crew.reloading.ends_by is not None
    process: Any = two.process
    crew.reloading.give_up()
    process.kill.assert_called_once()
    two.forget()
    crew.reloading.lose(two)
    assert crew.told(one) == [Prepare(1), Decide(1, commit=False)]


def test_a_worker_that_reads_nothing_is_ended_and_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is told is more than the line holds."""
    monkeypatch.setattr(worker_module, "STUCK", 1)
    crew = Crew(1)
    (worker,) = crew.workers
    process: Any = worker.process
    assert worker.line is not None
    limit(worker.line.connection)
    large = [Metric("guardserve_x", "x" * 2**24, "gauge")]
    began = time.monotonic()
    assert not worker.tell(Pooled(1, large, "", Seen(), None))
    assert time.monotonic() - began < 20
    process.kill.assert_called_once()


def test_the_last_word_of_a_worker_stays_whatever_comes_after_it() -> None:
    """A report that was on its way would put its counters back."""
    supervisor = Supervisor(print, (), sockets=[], workers=1, pool=Pool(), timeout=1)
    (worker,) = supervisor._workers
    last = Report(None, [CounterMetricFamily("guardserve_x", "x", value=9)])
    for report, kept in ((Report(1, []), Report(1, [])), (last, last), (Report(2, []), last)):
        supervisor._rounds.hear(worker, report)
        assert worker.report == kept


@contextmanager
def linked(runtime: Runtime) -> Iterator[tuple[Link, Line, Metrics, threading.Event]]:
    """Give a worker's end of a line, the supervisor's, its metrics, and what says that it was told to leave."""
    mine, theirs = Pipe()
    link, metrics, left = Link(theirs, ImportedCode()), Metrics(runtime), threading.Event()
    metrics.follow(runtime, ENGINE, "1")
    link.attach(metrics, left.set)
    with mine:
        yield link, Line(mine), metrics, left


def test_a_worker_hears_though_its_supervisor_does_not_read_what_it_says() -> None:
    """Each would wait for the other to read, for ever."""
    runtime = Runtime(loaded(Net()))
    with linked(runtime) as (_, supervisor, metrics, left):
        with mock.patch.object(metrics.registry, "collect", return_value=[Metric("x", "x" * 2**24, "gauge")]):
            for number in range(20):
                supervisor.send(Collect(number, 0.0))
            supervisor.send(Hurry())
            assert left.wait(30)
            rounds = [supervisor.receive().round for _ in range(20)]
        assert rounds == list(range(20))
    runtime.close()


def test_every_sample_around_a_reload_is_reported_once(tmp_path: Path) -> None:
    """Those that the old version still sees, those that the new one sees before it is asked, and not its probe's."""
    torch.manual_seed(0)
    profile = ReferenceProfile.fit(Net().eval(), [torch.randn(300, 3)], target_arl=1000)
    old, new = (Runtime(loaded(Net()), reference=profile, target_arl=1000) for _ in range(2))
    old.start()
    x = torch.randn(8, 3)
    path = tmp_path / "profile"
    profile.save(path)
    pool = Pool(reference=path, target_arl=1000)
    with (
        linked(old) as (link, supervisor, metrics, _),
        mock.patch.object(metrics.registry, "collect", return_value=[]),
    ):

        def report(number: int) -> Report:
            supervisor.send(Collect(number, 0.0))
            found: Report = supervisor.receive()
            pool.judge([found])
            return found

        metrics.begin_summaries()
        old.forward([x])
        assert [summary.samples.sum() for summary in report(1).summaries] == [8]
        old.forward([x])
        new.start()
        metrics.follow(new, ENGINE, "2")
        for runtime in (old, new, new):
            runtime.forward([x])
        old.close()
        metrics.leave(old)
        assert sum(summary.samples.sum() for summary in report(2).summaries) == 32
        assert report(3).summaries == []
        new.forward([x])
        new.close()
        link.close()
        last: Report = supervisor.receive()
        pool.judge([last])
        assert (last.round, sum(summary.samples.sum() for summary in last.summaries)) == (None, 8)
    assert pool.detection is not None
    assert pool.detection.samples == 48


def test_a_model_that_is_rolled_back_is_judged_by_its_own_profile_again(tmp_path: Path) -> None:
    """What comes late of the profile in between goes to that one's detector; a state saved then is the first's."""
    torch.manual_seed(0)
    path = tmp_path / "profile"
    profiles = {
        name: ReferenceProfile.fit(Net().eval(), [torch.randn(300, 3) + shift], target_arl=1000)
        for name, shift in (("first", 0), ("second", 1))
    }
    profiles["first"].save(path)
    pool = Pool(reference=path, target_arl=1000, state=tmp_path / "state")

    def see(name: str, count: int) -> int:
        net = Net().eval()
        with Monitor(net, reference=profiles[name], target_arl=1000) as monitor, torch.no_grad():
            monitor.take_summary()  # begins one
            net(torch.randn(count, 3))
            summary = monitor.take_summary()
        assert summary is not None
        pool.judge([Report(1, [], summaries=[summary])])
        assert pool.detection is not None
        return pool.detection.samples

    assert see("first", 4) == 4
    profiles["second"].save(path)
    assert see("second", 3) == 3
    assert see("first", 2) == 3, "it comes late"
    profiles["first"].save(path)
    assert see("first", 5) == 11
    assert see("second", 1) == 11


def test_a_call_to_one_worker_is_its_supervisors_to_answer() -> None:
    """It is asked, loads nothing by itself, and says what the supervisor says; without that it is told so."""

    async def ask(link: Link, supervisor: Line, outcome: Outcome | None) -> None:
        asking = asyncio.ensure_future(link.reload())
        message = await asyncio.get_running_loop().run_in_executor(None, supervisor.receive)
        assert isinstance(message, Reload)
        if outcome is None:
            supervisor.connection.close()
        else:
            supervisor.send(Outcome(message.ticket, outcome.failure, outcome.running))
        await asyncio.wait_for(asking, 30)

    runtime = Runtime(loaded(Net()))
    with linked(runtime) as (link, supervisor, _, left):
        asyncio.run(ask(link, supervisor, Outcome(0)))
        with pytest.raises(ReloadRunningError, match="twice"):
            asyncio.run(ask(link, supervisor, Outcome(0, "twice", running=True)))
        with pytest.raises(ReloadError, match="no file"):
            asyncio.run(ask(link, supervisor, Outcome(0, "no file")))
        with pytest.raises(ReloadError, match="supervisor of this worker is gone"):
            asyncio.run(ask(link, supervisor, None))
        assert left.wait(30)
    runtime.close()


def test_a_worker_prepares_and_then_does_what_is_decided() -> None:
    """It answers with the old version until it is told, with the new one afterwards, or never."""
    models = iter([Net(1.0), Net(2.0)])

    def load(_: Runtime) -> Runtime:
        return Runtime(loaded(next(models)))

    async def told() -> None:
        runtime = Runtime(loaded(Net()))
        mine, theirs = Pipe()
        link, supervisor = Link(theirs, ImportedCode()), Line(mine)
        app = create_app(runtime, load=load, together=link.reload)
        link.attach(app.metrics, lambda: None)
        loop = asyncio.get_running_loop()

        async def said() -> Any:
            return await asyncio.wait_for(loop.run_in_executor(None, supervisor.receive), 60)

        async with app.router.lifespan_context(app):
            await loop.run_in_executor(None, wait_until, lambda: runtime.failure is None)
            link.ready(app.versions)
            ready = await said()
            assert isinstance(ready, Ready)
            assert (ready.loaded[MODEL], ready.loaded[PROFILE]) == (app.gateway.inference.versions[-1], "")
            admitted = [link.admitted]
            supervisor.send(Listen())
            await loop.run_in_executor(None, wait_until, lambda: link.admitted)
            assert admitted == [False]
            first = app.gateway.inference
            supervisor.send(Prepare(1))
            prepared = await said()
            assert prepared.failure is None
            assert app.gateway.inference is first
            supervisor.send(Decide(1, commit=False))
            assert await said() == Decided(1, ready.loaded)
            supervisor.send(Prepare(2))
            prepared = await said()
            supervisor.send(Decide(2, commit=True))
            version = prepared.loaded[MODEL]
            assert await said() == Decided(2, {**ready.loaded, MODEL: version}) == Decided(2, prepared.loaded)
            assert app.gateway.inference.versions[-1] == version != first.versions[-1]
            supervisor.send(Prepare(3))
            assert "StopIteration" in (await said()).failure
            assert app.metrics.reloads == {"done": 1, "failed": 2}

    asyncio.run(told())
