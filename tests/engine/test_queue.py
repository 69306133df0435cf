"""The queue: its order, its bounds, and which requests go together."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardserve.engine import Job, QueueFullError
from guardserve.engine.queue import JobQueue


def job(rows: int = 1, width: int = 3) -> Job:
    """Make a request of so many rows."""
    return Job([torch.zeros(rows, width)])


def queue_of(*jobs: Job, max_rows: int = 8) -> JobQueue:
    """Let requests wait."""
    queue = JobQueue(100, max_rows)
    for one in jobs:
        queue.put(one)
    return queue


def test_what_waits_goes_together_up_to_the_maximum_of_rows() -> None:
    """A request that does not fit waits and comes first in the next batch."""
    jobs = [job(3), job(4), job(2), job(1)]
    queue = queue_of(*jobs)
    assert queue.take() == [jobs[0], jobs[1], jobs[3]]
    assert queue.take() == [jobs[2]]


def test_requests_of_another_shape_or_type_are_never_joined() -> None:
    """Each shape and each dtype has batches of its own, the oldest request first."""
    odd = Job([torch.zeros(1, 3, dtype=torch.float64)])
    jobs = [job(width=3), job(width=4), job(width=3), odd]
    queue = queue_of(*jobs)
    assert [queue.take() for _ in range(3)] == [[jobs[0], jobs[2]], [jobs[1]], [odd]]


def test_one_request_alone_may_have_more_rows_than_a_batch() -> None:
    """It was accepted, so it is run."""
    large = job(20)
    assert queue_of(large, job()).take() == [large]


def test_requests_that_must_not_be_joined_come_one_by_one() -> None:
    """As for a model whose answers depend on the batch."""
    jobs = [job(), job()]
    queue = queue_of(*jobs)
    assert [queue.take(join=False), queue.take(join=False)] == [[jobs[0]], [jobs[1]]]


def test_a_full_queue_refuses_at_once_and_takes_again_once_there_is_room() -> None:
    """The bound counts what waits, and not what was dropped or taken."""
    queue = JobQueue(2, 8)
    first = job()
    queue.put(first)
    queue.put(job())
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        queue.put(job())
    assert queue.drop(first)
    queue.put(job())
    queue.take()
    assert len(queue) == 0


def test_a_dropped_request_is_never_run_and_lets_go_of_its_inputs() -> None:
    """Dropping it twice, or once it runs, does nothing."""
    kept, gone = job(), job()
    queue = queue_of(gone, kept)
    assert queue.drop(gone)
    assert not queue.drop(gone)
    assert gone.inputs == ()
    assert queue.take() == [kept]
    assert not queue.drop(kept)
    assert kept.state == "running"


def test_a_closed_queue_gives_what_waits_and_then_none() -> None:
    """It takes nothing new."""
    waiting = job()
    queue = queue_of(waiting)
    queue.close()
    with pytest.raises(QueueFullError, match="stopping"):
        queue.put(job())
    assert queue.take() == [waiting]
    assert queue.take() is None


def test_a_taker_that_sleeps_wakes_for_work_for_its_timeout_and_for_the_end() -> None:
    """A wake that comes while nobody sleeps is not kept for a second one to trip over."""
    queue = JobQueue(10, 8)
    queue.wake()
    assert queue.take(timeout=0.01) == []
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.extend([queue.take(), queue.take()]))
    thread.start()
    time.sleep(0.05)
    one = job()
    queue.put(one)
    assert taken == [], "nobody has said so yet"
    queue.wake()
    queue.wake()
    time.sleep(0.05)
    queue.close()
    thread.join(5)
    assert taken == [[one], None]


def test_fewer_than_the_last_batch_had_wait_a_moment_for_those_who_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """So clients in turn do not stay apart: they go once there are as many, or the moment is over."""
    monkeypatch.setattr("guardserve.engine.queue.GATHER", 60)
    queue = queue_of(*[job() for _ in range(3)])
    assert len(queue.take() or ()) == 3
    queue.put(job())

    def come_back() -> None:
        queue.put(job())
        queue.put(job())
        queue.wake()

    back = threading.Timer(0.1, come_back)
    started = time.monotonic()
    back.start()
    assert len(queue.take() or ()) == 3
    assert 0.1 <= time.monotonic() - started < 60
    back.join()
    monkeypatch.setattr("guardserve.engine.queue.GATHER", 0.3)
    queue.put(job())
    started = time.monotonic()
    assert len(queue.take() or ()) == 1
    assert time.monotonic() - started >= 0.3
    monkeypatch.setattr("guardserve.engine.queue.GATHER", 60)
    queue.put(job())
    started = time.monotonic()
    assert len(queue.take() or ()) == 1
    assert time.monotonic() - started < 60


def test_an_idle_taker_takes_what_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the last batch had, once the moment after it is over."""
    monkeypatch.setattr("guardserve.engine.queue.GATHER", 1.0)
    queue = queue_of(*[job() for _ in range(3)])
    assert len(queue.take() or ()) == 3
    came: list[float] = []

    def come() -> None:
        came.append(time.monotonic())
        queue.put(job())
        queue.wake()

    comes = threading.Timer(1.1, come)
    comes.start()
    assert len(queue.take() or ()) == 1
    assert time.monotonic() - came[0] < 0.7
    comes.join()


def test_with_a_delay_the_oldest_waits_for_a_full_batch_but_no_longer() -> None:
    """Three rows of four wait for the delay; the fourth ends it at once."""
    queue = JobQueue(10, 4, max_delay=0.2)
    queue.put(job(3))
    started = time.monotonic()
    assert len(queue.take() or []) == 1
    assert 0.2 <= time.monotonic() - started < 60
    queue = JobQueue(10, 4, max_delay=60)
    queue.put(job(3))
    queue.put(job(1))
    started = time.monotonic()
    assert len(queue.take() or []) == 2
    assert time.monotonic() - started < 60


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=30), st.integers(1, 10))
def test_every_request_is_taken_once_within_the_bound_and_its_shape_in_order(
    shapes: list[tuple[int, int]], max_rows: int
) -> None:
    """Whatever comes: one shape a batch, its rows bounded, the oldest always in it, none lost and none twice."""
    jobs = [job(rows, width) for rows, width in shapes]
    queue = JobQueue(100, max_rows)
    for one in jobs:
        queue.put(one)
    queue.close()
    waiting = list(jobs)
    while (batch := queue.take()) is not None:
        assert batch[0] is waiting[0]
        assert len({one.shape for one in batch}) == 1
        assert len(batch) == 1 or sum(one.rows for one in batch) <= max_rows
        assert [one for one in waiting if one in batch] == batch
        waiting = [one for one in waiting if one not in batch]
    assert waiting == []
