"""The monitor: taps on a model, accumulated moments, and what they say."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from typing_extensions import Self

from guardserve.monitor.effect_size import ChannelShift, LayerMoments, LayerShift, layer_shift
from guardserve.monitor.taps import Record, Taps

SUBWINDOWS = 8
"""A window is this many merged sub-windows; it forgets one at a time, and nothing is ever subtracted."""

PENDING_FORWARDS = 32
"""Forwards that may wait to be accumulated before one that adds to them does the work."""

Seen = dict[int, LayerMoments]


@dataclass(frozen=True)
class Snapshot:
    """What a monitor has seen, layer by layer.

    Attributes:
        samples: Number of samples.
        layers: The layers that have seen any, in registration order.
        unobserved: BatchNorm layers that cannot be watched, each with the reason.
    """

    samples: int
    layers: tuple[LayerShift, ...]
    unobserved: dict[str, str]

    @property
    def worst_layer(self) -> LayerShift | None:
        """The layer with the largest Wasserstein-2 distance; None when no layer has a finite one."""
        known = [layer for layer in self.layers if math.isfinite(layer.wasserstein2)]
        return max(known, key=lambda layer: layer.wasserstein2, default=None)

    def worst_channels(self, limit: int = 5) -> list[tuple[str, ChannelShift]]:
        """Return the worst channels of all layers, worst first, each with its layer's name."""
        channels = [(layer.name, channel) for layer in self.layers for channel in layer.worst_channels]
        return sorted(channels, key=lambda item: item[1].wasserstein2, reverse=True)[:limit]


@dataclass(frozen=True)
class Verdict:
    """What the monitor makes of the recent window.

    Attributes:
        state: ``"warming"`` until the window holds enough samples, then ``"ok"`` or ``"shifted"``.
        samples: Samples seen so far.
        score: Largest layer Wasserstein-2 distance in the window, in running standard deviations; None while
            warming.
        threshold: The score from which on the state is ``"shifted"``.
        layer: The layer with that distance; None while warming.
        window: What the window shows.
    """

    state: Literal["warming", "ok", "shifted"]
    samples: int
    score: float | None
    threshold: float
    layer: str | None
    window: Snapshot


class Monitor:
    """Watches what enters every BatchNorm layer of a model.

    For each sample and channel it reads ``z = (x - running_mean) / sqrt(running_var + eps)`` over the
    positions, and accumulates moments over samples: positions of one sample are too much alike to count as
    independent. A shift then shows as an effect size against the running statistics alone, which needs no
    reference data but has no null distribution either: the threshold is a rule of thumb.

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
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 256,
        min_samples: int = 64,
        threshold: float = 0.5,
        worst_channels: int = 5,
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
        self.reset()
        self._taps = Taps(model, self._take)

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
        self._taps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget everything seen so far."""
        with self._lock:
            self._pending.clear()
            self._samples = 0
            self._total: Seen = {}
            self._windows: deque[tuple[int, Seen]] = deque([(0, {})])

    def snapshot(self, *, recent: bool = False) -> Snapshot:
        """Summarise all that was seen since the start or the last reset, or the recent window."""
        with self._lock:
            self._accumulate()
            samples, seen = self._recent() if recent else (self._samples, dict(self._total))
        points = self._taps.points
        layers = tuple(layer_shift(points[i], seen[i], self._worst_channels) for i in sorted(seen))
        return Snapshot(samples, layers, self.unobserved)

    def verdict(self) -> Verdict:
        """Judge the recent window."""
        window = self.snapshot(recent=True)
        worst = window.worst_layer
        if window.samples < self._min_samples or worst is None:
            return Verdict("warming", self._samples, None, self.threshold, None, window)
        state: Literal["ok", "shifted"] = "shifted" if worst.wasserstein2 >= self.threshold else "ok"
        return Verdict(state, self._samples, worst.wasserstein2, self.threshold, worst.name, window)

    def _take(self, record: Record) -> None:
        """Receive a record from the taps, in any thread."""
        self._pending.append(record)
        if len(self._pending) >= PENDING_FORWARDS and self._lock.acquire(blocking=False):
            try:
                self._accumulate()
            finally:
                self._lock.release()

    def _accumulate(self) -> None:
        """Move every pending record into the totals and the window; the lock is held."""
        batch: list[Record] = []
        samples = 0
        while self._pending:
            batch.append(self._pending.popleft())
            samples += len(batch[-1].readings[0][1])
            if samples >= max(1, self._window // SUBWINDOWS):
                self._merge(samples, batch)
                batch, samples = [], 0
        if batch:
            self._merge(samples, batch)

    def _merge(self, samples: int, batch: list[Record]) -> None:
        readings: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for record in batch:
            for index, mean, variance in record.readings:
                readings.setdefault(index, []).append((mean, variance))
        new = {
            index: LayerMoments.of(self._taps.points[index], *(torch.cat(parts) for parts in zip(*pairs, strict=True)))
            for index, pairs in readings.items()
        }
        self._samples += samples
        _merge_into(self._total, new)
        filled, seen = self._windows[-1]
        if filled >= self._window // SUBWINDOWS:
            filled, seen = 0, {}
            self._windows.append((filled, seen))
        _merge_into(seen, new)
        self._windows[-1] = (filled + samples, seen)
        while sum(filled for filled, _ in self._windows) - self._windows[0][0] >= self._window:
            self._windows.popleft()

    def _recent(self) -> tuple[int, Seen]:
        merged: Seen = {}
        for _, seen in self._windows:
            _merge_into(merged, seen)
        return sum(filled for filled, _ in self._windows), merged


def _merge_into(seen: Seen, new: Seen) -> None:
    for index, moments in new.items():
        seen[index] = seen[index].merge(moments) if index in seen else moments
