"""The monitor: taps on a model, accumulated moments, and what they say."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, deque
from dataclasses import dataclass, field

import torch
from torch import nn
from typing_extensions import Self

from guardserve.exceptions import ReferenceProfileError
from guardserve.monitor.detector import CHUNK, Detector, State
from guardserve.monitor.effect_size import LayerMoments, layer_shift
from guardserve.monitor.features import FeatureReader
from guardserve.monitor.reference import ReferenceProfile
from guardserve.monitor.taps import Record, Taps
from guardserve.monitor.verdict import Snapshot, Verdict

_log = logging.getLogger(__name__)

SUBWINDOWS = 8
"""A window is this many merged sub-windows; it forgets one at a time, and nothing is ever subtracted."""

PENDING_SAMPLES = 32
"""Samples that may wait, about, to be accumulated before the forward that brings more does the work."""


@dataclass
class Seen:
    """What has been accumulated over a stretch of the stream; two of them merge.

    Attributes:
        whole: Samples of whole forwards.
        parts: Samples that each layer saw when a part of the model was called by itself.
        layers: What each layer has accumulated.
    """

    whole: int = 0
    parts: Counter[int] = field(default_factory=Counter)
    layers: dict[int, LayerMoments] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples: those of whole forwards, and those of parts as the layer that saw most has them."""
        return self.whole + max(self.parts.values(), default=0)

    def merge(self, other: Seen) -> None:
        """Take in what another has seen."""
        self.whole += other.whole
        self.parts.update(other.parts)
        for index, moments in other.layers.items():
            mine = self.layers.get(index)
            self.layers[index] = moments if mine is None else mine.merge(moments)


class Monitor:
    """Watches what enters every BatchNorm layer of a model.

    For each sample and channel it reads ``z = (x - running_mean) / sqrt(running_var + eps)`` over the
    positions, and accumulates moments over samples: positions of one sample are too much alike to count as
    independent. A shift then shows as an effect size against the running statistics alone, which needs no
    reference data but has no null distribution either: the threshold is a rule of thumb. With a reference profile
    a detector judges each sample, in the order in which forwards end, at a known rate of false alarms.

    It works on any number of threads and removes itself wholly::

        with Monitor(model) as monitor:
            guard(x)
            print(monitor.snapshot().worst_layer)

    Attach it after wrapping the model and before the first call of a ``torch.compile``-d one. A layer that
    runs several times in a forward is seen as often.

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
    ) -> None:
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
        self.reset()
        take = weakref.WeakMethod(self._take)  # or the model's hooks would keep a forgotten monitor alive

        def emit(record: Record) -> None:
            method = take()
            if method is not None:
                method(record)

        with self._lock:  # other threads may be in a forward already, and must wait for the taps to be there
            self._taps = Taps(model, emit)
        self._finalizer = weakref.finalize(self, self._taps.close)
        if reference is not None:
            try:
                self._refer_to(reference, target_arl)
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

    def close(self) -> None:
        """Remove every hook from the model; what was seen can still be read."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget everything seen so far."""
        with self._lock:
            self._pending.clear()
            self._total = Seen()
            self._windows: deque[Seen] = deque([Seen()])
            if self._detector is not None:
                self._detector.reset()

    def snapshot(self, *, recent: bool = False) -> Snapshot:
        """Summarise all that was seen since the start or the last reset, or the recent window."""
        with self._lock:
            self._accumulate()
            seen = self._recent() if recent else Seen()
            if not recent:
                seen.merge(self._total)
        return self._summarise(seen)

    def _summarise(self, seen: Seen) -> Snapshot:
        points = self._taps.points
        layers = tuple(layer_shift(points[i], seen.layers[i], self._worst_channels) for i in sorted(seen.layers))
        unobservable = {point.name: point.unobservable_channels for point in points}
        return Snapshot(seen.samples, layers, self.unobserved, {name: n for name, n in unobservable.items() if n})

    def verdict(self) -> Verdict:
        """Judge what is pending and say what the monitor makes of what it has seen."""
        with self._lock:
            self._accumulate()
            seen, recent = self._total.samples, self._recent()
            detection = None if self._detector is None else self._detector.detection()
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
            )
        if worst is None:
            return Verdict("blind" if enough else "warming", seen, None, self.threshold, None, window)
        state: State = "shifted" if worst.wasserstein2 >= self.threshold else "ok"
        return Verdict(state, seen, score, self.threshold, worst.name, window)

    def scores(self) -> list[float]:
        """Drain the p-values of the samples judged since the last call, in order.

        Each is the share of clean samples at least as odd: small for a sample unlike the reference, uniform on
        clean data, NaN for a sample with NaN or infinity in a layer. The last 10,000 are kept; older ones are
        dropped when nobody drains them.

        Raises:
            ReferenceProfileError: If the monitor has no reference profile.
        """
        if self._detector is None:
            raise ReferenceProfileError("scores need a reference profile: use Monitor(model, reference=profile)")
        with self._lock:
            self._accumulate()
            return self._detector.drain()

    def _refer_to(self, reference: ReferenceProfile, target_arl: float) -> None:
        reference.check(self._taps.points)
        index = {point.name: i for i, point in enumerate(self._taps.points)}
        order = [index[name] for name in reference.layers]
        reader = FeatureReader([self._taps.points[i] for i in order], order)
        detector = Detector(reference, target_arl)
        reference.warn_if_too_small(target_arl)
        self._reader, self._detector = reader, detector

    def _take(self, record: Record) -> None:
        """Receive a record from the taps, in any thread."""
        self._pending.append(record)
        if len(self._pending) * _rows(record) >= PENDING_SAMPLES and self._lock.acquire(blocking=False):
            try:
                self._accumulate()
            except Exception:  # noqa: BLE001 - whatever it is, the answer is not to be lost with it
                _log.exception("a monitored forward could not be accumulated")
            finally:
                self._lock.release()

    def _accumulate(self) -> None:
        """Move every pending record into the totals and the window; the lock is held."""
        batch: list[Record] = []
        samples = 0
        while self._pending:
            batch.append(self._pending.popleft())
            samples += _rows(batch[-1])
            if samples >= max(1, self._window // SUBWINDOWS):
                self._merge(batch)
                batch, samples = [], 0
        if batch:
            self._merge(batch)

    def _merge(self, batch: list[Record]) -> None:
        new = Seen()
        readings: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for record in batch:
            if record.samples is not None:
                new.whole += record.samples
            for index, mean, variance in record.readings:
                if record.samples is None:
                    new.parts[index] += len(mean)
                readings.setdefault(index, []).append((mean, variance))
        for index, pairs in readings.items():
            point = self._taps.points[index]
            if point.readable:
                new.layers[index] = LayerMoments.of(point, *(torch.cat(parts) for parts in zip(*pairs, strict=True)))
        self._judge(batch)
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
        if self._detector is not None and self._reader is not None:
            complete = [record for record in batch if self._reader.complete(record)]
            for start in range(0, len(complete), CHUNK):
                self._detector.judge(self._reader.read(complete[start : start + CHUNK]))


def _rows(record: Record) -> int:
    return record.samples if record.samples is not None else len(record.readings[0][1])
