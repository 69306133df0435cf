"""The engine: answers that do not depend on the batch, faults that stay with their request, and recovery."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TIMEOUT, loaded, wait_until
from torch import nn

from guardserve import ReferenceProfile
from guardserve.engine import DeviceError, Engine, ForwardTimeoutError, Job, OutOfMemoryError, QueueFullError, Result
from guardserve.exceptions import InputError, ModelOutputError, NonFiniteOutputError
from guardserve.runtime import Runtime
from guardserve.signature import TensorSpec

NAN, INF = float("nan"), float("inf")


class Scripted(nn.Module):
    """A small model that does as the first feature of its rows says."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.batches: list[int] = []
        self.release = threading.Event()
        self.memory = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raise at 7, give NaN at -7, hang at 77, fail as a device at 777, and need a row of memory for each row."""
        self.batches.append(len(x))
        first = x[:, 0]
        if (first == 7).any():
            raise ValueError("seven")
        if (first == 77).any():
            self.release.wait(30)
        if (first == 777).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if len(x) > self.memory:
            raise torch.cuda.OutOfMemoryError("no memory")
        y: torch.Tensor = self.bn(x)
        return y.masked_fill(x[:, :1] == -7, NAN)


@contextmanager
def engine_of(module: nn.Module, *inputs: TensorSpec, **options: Any) -> Iterator[tuple[Engine, Runtime]]:
    """Run an engine over a module, started and ready."""
    runtime = Runtime(loaded(module, *inputs))
    engine = Engine(runtime, lambda _: None, **options)
    started = threading.Event()
    engine.start(lambda _: started.set())
    assert started.wait(TIMEOUT)
    if isinstance(module, Scripted):
        module.batches.clear()
    try:
        yield engine, runtime
    finally:
        engine.close(5)
        runtime.close()


def results(engine: Engine, *inputs: torch.Tensor, **options: Any) -> list[Result]:
    """Submit requests together and wait for what comes of each."""
    jobs = [Job([tensor], **options) for tensor in inputs]
    for job in jobs:
        engine.submit(job)
    engine.wake()
    return finished(jobs)


def finished(jobs: Sequence[Job]) -> list[Result]:
    """Wait until requests are done."""
    wait_until(lambda: all(job.result is not None for job in jobs))
    return [job.result for job in jobs if job.result is not None]


def rows(*first: float) -> torch.Tensor:
    """Make rows with these first features."""
    return torch.tensor([[value, 1.0, 2.0] for value in first])


def convolutional() -> nn.Module:
    """Return a small CNN with BatchNorm over images of any size, with statistics as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    for _ in range(5):
        model(torch.randn(16, 2, 8, 8) + 1)
    return model.eval()


CNN = convolutional()


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([4, 6])), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=25)
def test_a_request_is_answered_as_if_it_were_alone(shapes: list[tuple[int, int]], max_batch_size: int) -> None:
    """Whatever mix of sizes and shapes comes at once, each answer is that of its own rows, within rounding."""
    torch.manual_seed(len(shapes))
    spec = TensorSpec("x", torch.float32, (-1, 2, -1, -1))
    inputs = [torch.randn(count, 2, size, size) for count, size in shapes]
    with engine_of(CNN, spec, max_batch_size=max_batch_size) as (engine, _):
        answers = results(engine, *inputs)
    with torch.no_grad():
        for answer, tensor in zip(answers, inputs, strict=True):
            torch.testing.assert_close(answer.outputs["output"], CNN(tensor), rtol=1e-5, atol=1e-6)


def test_requests_that_wait_share_a_forward() -> None:
    """One that is alone is run at once; those that came meanwhile go together."""
    model = Scripted()
    with engine_of(model, max_batch_size=4) as (engine, _):
        blocking = Job([rows(77)])
        engine.submit(blocking)
        engine.wake()
        wait_until(lambda: model.batches == [1])
        jobs = [Job([rows(*range(count))]) for count in (1, 2, 3)]
        for job in jobs:
            engine.submit(job)
        engine.wake()
        assert engine.counts.waiting == 3
        model.release.set()
        finished([blocking, *jobs])
        assert model.batches == [1, 3, 3]


def test_what_is_wrong_with_one_request_is_its_own_error_alone() -> None:
    """NaN in its input, NaN in its output, and a forward that raises: its mates get their answers."""
    model = Scripted()
    with engine_of(model) as (engine, runtime):
        fine, nan_in, nan_out, raising, also = results(
            engine, rows(1, 2), rows(NAN), rows(3, -7), rows(7), rows(4, 5, 6)
        )
        assert fine.error is None
        assert also.outputs["output"].shape == (3, 3)
        assert isinstance(nan_in.error, InputError)
        assert isinstance(nan_out.error, NonFiniteOutputError)
        assert nan_out.error.rows == (1,), "the row of the request, not of the batch"
        assert isinstance(raising.error, ValueError)
        assert engine.counts.faults["batch_retry"] == 1
        assert runtime.failure is None
        assert runtime.nonfinite == {("input", "x"): 1, ("output", "output"): 1}


def test_a_request_may_take_nonfinite_outputs_for_its_answer() -> None:
    """It gets them, and is told which; they are counted all the same."""
    with engine_of(Scripted()) as (engine, runtime):
        (result,) = results(engine, rows(1, -7), allow_nonfinite=True)
        assert result.error is None
        assert result.outputs["output"].isnan().sum() == 3
        assert [error.rows for error in result.nonfinite] == [(1,)]
        assert runtime.nonfinite["output", "output"] == 1


class ByBatch(nn.Module):
    """A model whose answers depend on the batch, which no flag of a BatchNorm layer shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subtract the batch's mean, unless there is only one row."""
        return x - x.mean(0) * (len(x) > 1)


def test_a_model_whose_answers_depend_on_the_batch_is_never_joined() -> None:
    """The start finds it out, and each request is answered as if it were alone."""
    with engine_of(ByBatch()) as (engine, runtime):
        assert runtime.apart is not None
        assert "depends on its batch mates" in runtime.apart
        answers = results(engine, *[rows(float(i)) for i in range(6)])
        assert [float(answer.outputs["output"][0, 0]) for answer in answers] == [0, 1, 2, 3, 4, 5]


class Unsound(nn.Module):
    """Gives NaN for whatever it is shown."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by nothing."""
        return x * NAN


def test_a_model_that_never_started_is_not_tested_and_its_engine_ends() -> None:
    """Its thread waits for requests to refuse, though the time for a self-test has passed many times."""
    runtime = Runtime(loaded(Unsound()))
    engine = Engine(runtime, lambda _: None, self_test_interval=0.01)
    with mock.patch.object(engine, "test", side_effect=engine.test) as test:
        started = threading.Event()
        engine.start(lambda _: started.set())
        assert started.wait(TIMEOUT)
        time.sleep(0.2)
        assert runtime.failure is not None
        assert test.call_count == 0
        assert engine.close(10)
    runtime.close()


class ToTheLongest(nn.Module):
    """Averages embeddings over as many places as the longest row of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average."""
        longest = int((x > 0).sum(1).max().clamp(min=1))
        y: torch.Tensor = self.embedding(x[:, :longest]).mean(1)
        return y


def test_rows_of_numbers_that_depend_on_each_other_are_never_joined() -> None:
    """The start shows the model rows of several lengths, though one of zeros is all that a number's type tells."""
    with engine_of(ToTheLongest(), TensorSpec("x", torch.int64, (-1, 6))) as (_, runtime):
        assert runtime.apart is not None
        assert "depends on its batch mates" in runtime.apart


class Kept(nn.Module):
    """Writes its answers where it wrote those before."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.zeros(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Copy."""
        return self.out[: len(x)].copy_(x)


def test_an_answer_stays_as_it_is_when_the_model_writes_over_it() -> None:
    """What a model returns may be its own memory, and the next forward comes before the answer is sent."""
    with engine_of(Kept()) as (engine, _):
        (first,) = results(engine, rows(1))
        results(engine, rows(2))
        assert float(first.outputs["output"][0, 0]) == 1


def test_a_model_of_one_batch_size_is_never_joined() -> None:
    """As a program exported for it."""
    with engine_of(nn.BatchNorm1d(3).eval(), TensorSpec("x", torch.float32, (1, 3))) as (engine, runtime):
        assert runtime.apart == "the model takes batches of 1 only"
        assert all(answer.error is None for answer in results(engine, *[rows(1.0)] * 5))


class FewRows(nn.Module):
    """Gives at most two rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cut the batch."""
        return x[:2]


def test_a_joint_forward_without_a_row_for_each_sample_ends_the_joining() -> None:
    """The requests are answered one by one, and so are those that follow."""
    with engine_of(FewRows()) as (engine, runtime):
        answers = results(engine, *[rows(1.0)] * 3, rows(1, 2, 3))
        assert [type(answer.error) for answer in answers] == [type(None)] * 3 + [ModelOutputError]
        assert runtime.apart is not None
        results(engine, rows(1), rows(2), rows(3))
        assert engine.counts.faults["batch_retry"] == 1


def test_memory_that_does_not_suffice_is_tried_with_half_of_the_rows() -> None:
    """Six rows fit as two forwards of three; they are counted, and nothing is lost."""
    model = Scripted()
    with engine_of(model) as (engine, runtime):
        model.memory = 3
        answers = results(engine, rows(1, 2), rows(3, 4), rows(5, 6))
        assert all(answer.error is None for answer in answers)
        torch.testing.assert_close(answers[2].outputs["output"], model.bn(rows(5, 6)))
        assert model.batches == [6, 3, 3]
        assert engine.counts.faults["out_of_memory"] == 1
        assert runtime.failure is None


def test_memory_that_does_not_suffice_at_all_makes_the_model_unready_until_it_does() -> None:
    """A self-test makes it ready again, and that is counted."""
    model = Scripted()
    with engine_of(model) as (engine, runtime):
        model.memory = 0
        (answer,) = results(engine, rows(1.0))
        assert isinstance(answer.error, OutOfMemoryError)
        assert runtime.failure is not None
        assert "memory" in runtime.failure
        time.sleep(1.2)
        assert runtime.failure is not None, "the self-test has failed"
        model.memory = 1000
        wait_until(lambda: runtime.failure is None)
        assert engine.counts.recoveries == 1


def test_an_error_of_the_device_makes_the_model_unready_and_is_not_retried() -> None:
    """After a sticky error nothing works any more: the batch fails at once."""
    model = Scripted()
    with engine_of(model) as (engine, runtime):
        answers = results(engine, rows(1.0), rows(777.0))
        assert all(isinstance(answer.error, DeviceError) for answer in answers)
        assert model.batches == [2]
        assert runtime.failing
        assert engine.counts.faults["device_error"] == 1


def test_a_forward_that_hangs_fails_its_requests_and_another_worker_takes_over() -> None:
    """Unready until a self-test passes on the new thread; what waited is answered; the old thread ends by itself."""
    model = Scripted()
    with engine_of(model, forward_timeout=1.0, max_batch_size=1) as (engine, runtime):
        hanging = Job([rows(77.0)])
        engine.submit(hanging)
        waiting = Job([rows(1.0)])
        engine.submit(waiting)
        engine.wake()
        stuck, fine = finished([hanging, waiting])
        assert isinstance(stuck.error, ForwardTimeoutError)
        assert fine.error is None
        wait_until(lambda: runtime.failure is None)
        assert (engine.counts.faults["hang"], engine.counts.recoveries) == (1, 1)
        assert len(workers()) == 2
        model.release.set()
        wait_until(lambda: len(workers()) == 1)
        assert results(engine, rows(1.0))[0].error is None
        assert not model.training, "the flags are held as before"


def test_two_hanging_forwards_leave_the_model_unready_until_one_ends() -> None:
    """No third thread is started; when one comes back the model is tested and works again."""
    model = Scripted()
    with engine_of(model, forward_timeout=1.0) as (engine, runtime):
        for count in (1, 2):
            assert isinstance(results(engine, rows(77.0))[0].error, ForwardTimeoutError)
            assert engine.counts.faults["hang"] == count
        time.sleep(0.5)
        assert runtime.failing
        assert len(workers()) == 2
        model.release.set()
        wait_until(lambda: runtime.failure is None)
        assert results(engine, rows(1.0))[0].error is None


def workers() -> list[threading.Thread]:
    """Return the threads that run forwards."""
    return [thread for thread in threading.enumerate() if thread.name == "guardserve-forward"]


def test_p_values_come_with_the_rows_of_the_request_that_asked() -> None:
    """Joined with others, a clean row and an odd one keep their own; without a wish there are none."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
    torch.manual_seed(0)
    profile = ReferenceProfile.fit(model, [torch.randn(500, 3)], target_arl=1000)
    runtime = Runtime(loaded(model), reference=profile, target_arl=1000)
    engine = Engine(runtime, lambda _: None)
    started = threading.Event()
    engine.start(lambda _: started.set())
    assert started.wait(TIMEOUT)
    try:
        usual, odd = torch.full((2, 3), 0.1), torch.full((1, 3), 30.0)
        jobs = [Job([usual], score=True), Job([odd], score=True), Job([usual])]
        for job in jobs:
            engine.submit(job)
        engine.wake()
        of_usual, of_odd, _ = (result.p_values for result in finished(jobs))
        assert of_usual is not None
        assert of_odd is not None
        assert (len(of_usual), len(of_odd)) == (2, 1)
        assert of_odd[0] < min(of_usual)
        assert results(engine, usual)[0].p_values is None
    finally:
        engine.close(5)
        runtime.close()


def test_closing_answers_everything_that_was_accepted() -> None:
    """And refuses what comes later."""
    model = Scripted()
    with engine_of(model, max_batch_size=2) as (engine, _):
        jobs = [Job([rows(float(i))]) for i in range(6)]
        for job in jobs:
            engine.submit(job)
        engine.wake()
        assert engine.close(10)
        assert all(job.result is not None and job.result.error is None for job in jobs)
        with pytest.raises(QueueFullError, match="stopping"):
            engine.submit(Job([rows(1.0)]))


def test_results_come_back_once_for_each_batch_with_its_rows_and_seconds() -> None:
    """Not once for each request: the event loop is woken as seldom as may be."""
    delivered: list[int] = []
    forwards: list[tuple[int, float]] = []
    runtime = Runtime(loaded(Scripted()))
    engine = Engine(
        runtime,
        lambda jobs: delivered.append(len(jobs)),
        forward_ended=lambda count, seconds: forwards.append((count, seconds)),
    )
    started = threading.Event()
    engine.start(lambda _: started.set())
    assert started.wait(TIMEOUT)
    results(engine, rows(1), rows(2, 3))
    engine.close(5)
    runtime.close()
    assert sum(delivered) == 2
    assert sum(count for count, _ in forwards) == 3
    assert all(0 < seconds < 5 for _, seconds in forwards)


def test_a_model_that_fails_its_probe_is_not_tested_again() -> None:
    """It never worked: somebody has to look."""

    class Raising(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(str(len(x)))

    run: Callable[..., Any] = engine_of
    with run(Raising()) as (engine, runtime):
        assert runtime.failure is not None
        assert not runtime.failing
        runtime.fail("another reason")
        assert "start-up probe" in runtime.failure
        assert engine.counts.recoveries == 0


class Drawing(nn.Module):
    """Answers the same input differently each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add noise."""
        return x + torch.rand(len(x), 1)


def test_a_model_that_draws_its_answers_passes_its_self_tests() -> None:
    """They look for finite outputs only, as there is no known answer."""
    with engine_of(Drawing(), self_test_interval=0.05) as (engine, runtime):
        time.sleep(0.5)
        assert runtime.failure is None
        assert engine.counts.faults["self_test"] == 0


@pytest.mark.parametrize(("interval", "tested"), [(0.1, True), (0.0, False)])
def test_a_model_that_breaks_while_nobody_asks_is_found_out_by_a_self_test(interval: float, tested: bool) -> None:
    """It is unready and counted before a request meets it, and ready again when it works; without an interval not."""
    model = Scripted()
    with engine_of(model, self_test_interval=interval) as (engine, runtime):
        model.memory = 0
        if tested:
            wait_until(lambda: runtime.failure is not None)
        time.sleep(0.3)
        assert (runtime.failure is not None) is tested
        assert engine.counts.faults["self_test"] == tested
        assert bool(model.batches) is tested
        model.memory = 1000
        wait_until(lambda: runtime.failure is None)
        assert engine.counts.recoveries == tested
