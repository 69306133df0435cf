"""The monitor: taps on a model, accumulated moments, and what they say."""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from os import PathLike

from torch import nn
from typing_extensions import Self

from guardserve.detection.detector import CHUNK, Detection, Detector, State
from guardserve.detection.files import write_whole
from guardserve.detection.merging import Summarizer, Summary
from guardserve.detection.reference import ReferenceProfile
from guardserve.detection.state_file import load_state, state_bytes
from guardserve.exceptions import ReferenceProfileError
from guardserve.monitor.accumulation import Constants, Scales, Seen, constants_of, same_constants
from guardserve.monitor.effect_size import layer_shifts
from guardserve.monitor.lesson import Lesson
from guardserve.monitor.verdict import Snapshot, Verdict
from guardserve.monitor.worker import Worker
from guardserve.observation.budget import Budget
from guardserve.observation.features import FeatureReader
from guardserve.observation.reading import VALUES
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

_log = logging.getLogger(__name__)

SUBWINDOWS = 8
"""A window is this many merged sub-windows; it forgets one at a time, and nothing is ever subtracted."""

PENDING = 32
"""Forwards that may wait, about, before the monitor's thread is woken to accumulate them."""

PENDING_VALUES = 2**18
"""Values that they may have shown, one for each channel of each sample."""

MOST_PENDING = 2 * PENDING
"""Forwards that may wait, about, before the one that brings more does the work: nothing is dropped."""


class Monitor:
    """Watches what enters every BatchNorm layer of a model.

    For each sample and channel it reads ``z = (x - running_mean) / sqrt(running_var + eps)`` over the
    positions, and accumulates moments over samples: positions of one sample are too much alike to count as
    independent. A shift then shows as an effect size against the running statistics alone, which needs no
    reference data but has no null distribution either: the threshold is a rule of thumb. With a reference profile
    a detector judges each sample, in the order in which forwards end, at a known rate of false alarms.

    The forwards only read. What they read is accumulated and judged by a thread of the monitor's own, or by whoever
    asks for what was seen. It works on any number of threads and removes itself wholly::

        with Monitor(model) as monitor:
            guard(x)
            print(monitor.snapshot().worst_layer)

    Attach it after wrapping the model and before the first call of a ``torch.compile``-d one, and neither attach nor
    close it while another thread's forward is being compiled: the compiler then makes that forward raise. A layer that
    runs several times in a forward is seen as often, also where the model calls itself.

    Args:
        model: The model, in any mode.
        window: Samples in the recent window, which :meth:`verdict` judges. It forgets an eighth at a time, so
            it holds up to that much more, or up to one batch more if that is larger.
        min_samples: Samples that the window must hold before it is judged.
        threshold: Score from which on the state is ``"shifted"``, in running standard deviations.
        worst_channels: How many channels a snapshot names in each layer.
        reference: What clean data look like to this model. Forwards that do not pass each of its layers, with one
            row a sample, are not judged.
        target_arl: With a reference, samples between false alarms, on average.
        values: Values to read of each sample at each layer, about, at positions that change from forward to forward;
            None reads all. With a reference, as many are read as it was made with.
        budget: Share of a forward's time that reading may take, such as 0.02: then ``values`` is where to begin.
            A reference leaves no choice, so with one the share is only measured.

    Raises:
        ReferenceMismatchError: If the reference profile belongs to another model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 256,
        min_samples: int = 64,
        threshold: float = 0.5,
        worst_channels: int = 5,
        reference: ReferenceProfile | None = None,
        target_arl: float = 10_000,
        values: int | None = VALUES,
        budget: float | None = None,
    ) -> None:
        if values is not None and values < 1:
            raise ValueError(f"values={values}: read at least 1 value of each sample, or all of them with None")
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"budget={budget}: use a share of a forward's time between 0 and 1, such as 0.02")
        if not 1 <= min_samples <= window:
            raise ValueError(f"min_samples={min_samples}, window={window}: use 1 <= min_samples <= window")
        if not threshold > 0:
            raise ValueError(f"threshold={threshold}: use a positive number of running standard deviations")
        self.threshold = threshold
        self._window = window
        self._min_samples = min_samples
        self._worst_channels = worst_channels
        self._lock = threading.Lock()
        self._pending: deque[Record] = deque()
        self._detector: Detector | None = None
        self._reader: FeatureReader | None = None
        self._lesson: Lesson | None = None
        self._waiting = _Waiting()
        self._unobservable: dict[str, tuple[Constants, int]] = {}
        self._worker = Worker(self._work, "guardserve-monitor")
        with self._lock:  # other threads may be in a forward already, and must wait for the taps to be there
            self._taps = Taps(model, self._emitter(), values if reference is None else reference.values)
            self._budget = Budget(self._taps, budget if reference is None else None)
            self._scales = Scales(self._taps.points)
            self._forget()
        self._finalizer = weakref.finalize(self, _close, self._taps, self._worker)
        _monitors.add(self)
        if reference is not None:
            try:
                self._refer_to(reference, target_arl)
                reference.warn(target_arl)
            except BaseException:
                self.close()
                raise

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of the watched layers, in registration order."""
        return tuple(point.name for point in self._taps.points)

    @property
    def unobserved(self) -> dict[str, str]:
        """BatchNorm layers that cannot be watched, each with the reason."""
        return dict(self._taps.unobserved)

    @property
    def share(self) -> float | None:
        """Share of the forwards' time spent on reading, by the last of those that were timed; None before the first.

        One forward in 16 is timed. On an accelerator it is the time of the thread that launches the work.
        """
        return self._budget.share

    @property
    def values(self) -> int | None:
        """Values that are read of each sample at each layer now, about; None is all."""
        return self._taps.values

    @property
    def reference(self) -> ReferenceProfile | None:
        """The profile that samples are judged by now; None without one, and while it is being made."""
        return None if self._detector is None else self._detector.profile

    def learn(
        self,
        samples: int,
        target_arl: float = 10_000,
        learned: Callable[[ReferenceProfile], object] = lambda _profile: None,
    ) -> None:
        """Make a reference profile of the next samples, and judge by it what comes once it is made.

        It is made in the background, from seconds to a minute or two after the last of these samples; until then the
        state is ``"warming"``. Nothing that was or is seen meanwhile is lost to the totals and the window. How much is
        read of a sample stays as it is now, whatever the budget. :meth:`reset` begins with the next samples again,
        unless the profile is being made already. If none can be made, that is logged, and the running statistics
        alone go on to judge.

        Args:
            samples: Finite samples to take, taken for clean.
            target_arl: Samples between false alarms, on average.
            learned: Called with the profile in the thread that made it, once it is in use.

        Raises:
            ReferenceProfileError: If so few samples give no profile, or the monitor has one, or is making it.
        """
        lesson = Lesson(samples, target_arl, learned)
        with self._lock:
            if self._detector is not None or self._lesson is not None:
                raise ReferenceProfileError(
                    "the monitor has a reference profile, or is making one: use another monitor"
                )
            self._accumulate()
            self._budget = Budget(self._taps, None)
            self._lesson = lesson
            self._taps.keyed = True

    def save_state(self, path: str | PathLike[str]) -> None:
        """Judge what is pending and write what the detector remembers, whole or not at all.

        Raises:
            ReferenceProfileError: If the monitor has no reference profile.
            OSError: If it cannot be written.
        """
        with self._lock:
            self._accumulate()
            if self._detector is None:
                raise ReferenceProfileError("only a detector has a state: use Monitor(model, reference=profile)")
            data = state_bytes(self._detector)
        write_whole(path, data)

    def load_state(self, path: str | PathLike[str]) -> bool:
        """Let the detector go on from where a file says that one was; the totals and the window begin anew.

        Returns:
            Whether there was a file; without one the detector stays as it is.

        Raises:
            ReferenceProfileError: If the monitor has no reference profile.
            DetectorStateError: If the file is damaged, or of a detector with another profile.
        """
        with self._lock:
            self._accumulate()
            if self._detector is None:
                raise ReferenceProfileError("only a detector has a state: use Monitor(model, reference=profile)")
            return load_state(path, self._detector)

    def close(self) -> None:
        """Remove every hook from the model and end the thread; what was seen can still be read."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget everything seen so far."""
        with self._lock:
            self._accumulate()
            self._forget()

    def _forget(self) -> None:
        self._total = Seen()
        self._windows: deque[Seen] = deque([Seen()])
        if self._detector is not None:
            self._detector.reset()
        if self._lesson is not None:
            self._lesson.restart()

    def snapshot(self, *, recent: bool = False) -> Snapshot:
        """Summarise all that was seen since the start or the last reset, or the recent window."""
        with self._lock:
            self._accumulate()
            seen = self._recent() if recent else Seen()
            if not recent:
                seen.merge(self._total)
        return self._summarise(seen)

    def counts(self) -> tuple[int, dict[str, int]]:
        """Count the samples since the start or the last reset, and for each layer those with a non-finite value."""
        with self._lock:
            self._accumulate()
            total = self._total
            nonfinite = Counter[str]()
            for route, moments in total.routes.items():
                for index, count in zip(route, moments.nonfinite_samples.tolist(), strict=True):
                    nonfinite[self._taps.points[index].name] += count
            return total.samples, dict(nonfinite)

    @property
    def unobservable_channels(self) -> dict[str, int]:
        """Layers with channels that are left out, with the number of these channels; see :class:`Snapshot`."""
        for point in self._taps.points:
            constants = constants_of([point])
            known = self._unobservable.get(point.name)
            if known is None or not same_constants(known[0], constants):
                self._unobservable[point.name] = constants, point.unobservable_channels
        return {name: count for name, (_, count) in self._unobservable.items() if count}

    def _summarise(self, seen: Seen) -> Snapshot:
        points = self._taps.points
        found = [
            (points[index], moments) for index, moments in seen.layers(self._scales).items() if points[index].readable
        ]
        layers = layer_shifts(found, self._worst_channels)
        return Snapshot(seen.samples, layers, self.unobserved, self.unobservable_channels)

    def verdict(self) -> Verdict:
        """Judge what is pending and say what the monitor makes of what it has seen."""
        with self._lock:
            self._accumulate()
            seen, recent = self._total.samples, self._recent()
            detection = None if self._detector is None else self._detector.detection()
            learning = self._lesson is not None
        return self._conclude(seen, recent, detection, learning=learning)

    def window(self, since: float) -> tuple[list[tuple[float, int]], Seen]:
        """Return what the recent window holds, for another monitor of the same model to :meth:`judge`.

        Args:
            since: By the monotonic clock: parts of the window that ended before are left out of what they show.

        Returns:
            When each part of the window ended, and its samples; and what the parts show together.
        """
        with self._lock:
            self._accumulate()
            seen = Seen()
            for part in self._windows:
                if part.ended >= since:
                    seen.merge(part)
            return [(part.ended, part.samples) for part in self._windows if part.samples], seen

    def judge(self, window: Seen, detection: Detection | None) -> Verdict:
        """Say what this monitor makes of what several of the same model have seen in a recent window.

        Args:
            window: What they have seen, merged.
            detection: What a detector makes of the samples of all, if there is a reference profile.
        """
        with self._lock:
            window = self._scales.prepare(window)
            learning = self._lesson is not None
        return self._conclude(window.samples, window, detection, learning=learning)

    def take_summary(self) -> Summary | None:
        """Return what the samples since the last call show, for a detector of several monitors' samples.

        The first call begins it. None without any, or without a reference profile.
        """
        with self._lock:
            self._accumulate()
            if self._detector is None:
                return None
            if self._detector.summarizer is None:
                self._detector.summarizer = Summarizer(self._detector.profile)
            return self._detector.summarizer.take()

    def _conclude(self, seen: int, recent: Seen, detection: Detection | None, *, learning: bool) -> Verdict:
        window = self._summarise(recent)
        enough = window.samples >= self._min_samples
        worst = window.worst_layer if enough else None
        score = None if worst is None else worst.wasserstein2
        if detection is not None:
            return Verdict(
                detection.state,
                seen,
                score,
                self.threshold,
                detection.layer,
                window,
                evidence=detection.evidence,
                evidence_threshold=detection.threshold,
                alarms=detection.alarms,
                alarm_at=detection.alarm_at,
                channels=detection.channels,
                reading=detection.reading,
                layers=detection.layers,
            )
        if worst is None or learning:
            return Verdict("blind" if enough and not learning else "warming", seen, score, self.threshold, None, window)
        state: State = "shifted" if worst.wasserstein2 >= self.threshold else "ok"
        return Verdict(state, seen, score, self.threshold, worst.name, window)

    def scores(self) -> list[float]:
        """Drain the p-values of the samples judged since the last call, in order.

        Each is the share of clean samples at least as odd: small for a sample unlike the reference, uniform on
        clean data, 0 for a sample with NaN or infinity in a layer. The last 10,000 are kept; older ones are
        dropped when nobody drains them.

        Raises:
            ReferenceProfileError: If the monitor has no reference profile.
        """
        if self._detector is None:
            raise ReferenceProfileError("scores need a reference profile: use Monitor(model, reference=profile)")
        with self._lock:
            self._accumulate()
            return self._detector.drain()

    @contextmanager
    def scoring(self) -> Iterator[list[float]]:
        """Collect the p-values of the samples that this thread forwards inside, in the order of their rows.

        For example::

            with monitor.scoring() as scores:
                model(x)

        They are there when the forward returns, as it judges its samples itself, after those of forwards that ended
        before. NaN stands for a sample whose forward does not pass each layer. :meth:`scores` tells the others too.

        Raises:
            ReferenceProfileError: If the monitor has no reference profile.
        """
        if self._detector is None:
            raise ReferenceProfileError("scores need a reference profile: use Monitor(model, reference=profile)")
        scores: list[float] = []
        outer, self._waiting.scores = self._waiting.scores, scores
        try:
            yield scores
        finally:
            self._waiting.scores = outer
            if outer is not None:
                outer += scores

    def _refer_to(self, reference: ReferenceProfile, target_arl: float) -> None:
        reference.check(self._taps.points)
        index = {point.name: i for i, point in enumerate(self._taps.points)}
        order = [index[name] for name in reference.layers]
        reader = FeatureReader([self._taps.points[i] for i in order], order)
        detector = Detector(reference, target_arl)
        with self._lock:
            self._reader, self._detector, self._lesson = reader, detector, None

    def _learned(self, future: Future[ReferenceProfile]) -> None:
        """Judge by the profile that was made, in the thread that made it."""
        lesson = self._lesson
        if lesson is None:
            return
        try:
            reference = future.result()
            self._refer_to(reference, lesson.target_arl)
            for caution in reference.cautions(lesson.target_arl):
                _log.warning("the reference profile made of the first samples: %s", caution)
        except ReferenceProfileError as error:
            _log.warning("no reference profile could be made of the first samples, and it goes on without: %s", error)
            with self._lock:
                self._lesson = None
        except Exception:  # noqa: BLE001 - whatever it is, the model is served on
            _log.exception("no reference profile could be made of the first samples: it goes on without")
            with self._lock:
                self._lesson = None
        else:
            lesson.learned(reference)

    def _emitter(self) -> Callable[[Record], None]:
        """Return what receives records from the taps, in any thread."""
        pending, waiting = self._pending, self._waiting
        this = weakref.ref(self)  # or the model's hooks would keep a forgotten monitor alive

        def emit(record: Record) -> None:
            load = math.inf
            if waiting.scores is None:
                pending.append(record)
                # how much is pending, if all of it is like this: from 1 on it is worth the work
                load = len(pending) * max(1 / PENDING, min(1 / 2, record.size / PENDING_VALUES))
                if load < 1:
                    return
            monitor = this()
            if monitor is not None:
                monitor._see_to(record, waiting.scores, load)  # noqa: SLF001

        return emit

    def _see_to(self, record: Record, sink: list[float] | None, load: float) -> None:
        """Judge a record at once for who waits for its p-values, and what is pending at once or soon."""
        if sink is not None:
            due = len(sink) + record.count
            record.sink = sink
            self._pending.append(record)
            self._work()
            sink += [math.nan] * (due - len(sink))  # whatever went wrong
        elif load > MOST_PENDING / PENDING:
            self._work()
        else:
            self._worker.wake()

    def _work(self) -> None:
        """Judge what is pending, in whichever thread."""
        with self._lock:
            try:
                self._accumulate()
            except Exception:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
                _log.exception("a monitored forward could not be accumulated")

    def _accumulate(self) -> None:
        """Move the records that are pending into the totals and the window; the lock is held."""
        batch: list[Record] = []
        samples = 0
        for _ in range(len(self._pending)):
            batch.append(self._pending.popleft())
            samples += batch[-1].count
            if samples >= max(1, self._window // SUBWINDOWS):
                self._merge(batch)
                batch, samples = [], 0
        if batch:
            self._merge(batch)

    def _merge(self, batch: list[Record]) -> None:
        for record in batch:
            self._budget.see(record)
        new = Seen.of(batch, self._scales)
        self._judge(batch)
        if self._lesson is not None:
            self._lesson.take(self._taps, batch, self._learned)
        self._total.merge(new)
        if self._windows[-1].samples >= self._window // SUBWINDOWS:
            self._windows.append(Seen())
        self._windows[-1].merge(new)
        while sum(part.samples for part in self._windows) - self._windows[0].samples >= self._window:
            self._windows.popleft()

    def _recent(self) -> Seen:
        """Merge the window; the lock is held."""
        seen = Seen()
        for part in self._windows:
            seen.merge(part)
        return seen

    def _judge(self, batch: list[Record]) -> None:
        """Show the detector what it can judge; the lock is held."""
        if self._detector is None or self._reader is None:
            return
        complete = [record for record in batch if self._reader.complete(record)]
        for start in range(0, len(complete), CHUNK):
            chunk = complete[start : start + CHUNK]
            scores = iter(self._detector.judge(self._reader.read(chunk)))
            for record in chunk:
                mine = list(islice(scores, record.count))
                if record.sink is not None:
                    record.sink += mine
        for record in batch:
            if record.sink is not None and record not in complete:
                record.sink += [math.nan] * record.count


class _Waiting(threading.local):
    """Where the p-values of this thread's samples go; None when it does not wait for them."""

    scores: list[float] | None = None


_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


def _close(taps: Taps, worker: Worker) -> None:
    taps.close()
    worker.stop()


def _after_fork() -> None:
    """Give monitors in a forked process a lock and a thread that work: those of the parent stayed there."""
    for monitor in list(_monitors):
        monitor._lock = threading.Lock()  # noqa: SLF001
        monitor._worker = Worker(monitor._work, "guardserve-monitor")  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork)
