"""What a monitor answers: a summary of what it has seen, and what it makes of that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from guardserve.detection.detector import State
from guardserve.detection.diagnosis import MovedChannel
from guardserve.monitor.effect_size import ChannelShift, LayerShift


@dataclass(frozen=True)
class Snapshot:
    """What a monitor has seen, layer by layer.

    Attributes:
        samples: Number of samples.
        layers: The layers that have seen any, in registration order.
        unobserved: BatchNorm layers that cannot be watched, each with the reason.
        unobservable_channels: Layers with channels that are left out, because fusion has scaled away what enters
            them or their statistics are not finite, with the number of these channels.
    """

    samples: int
    layers: tuple[LayerShift, ...]
    unobserved: dict[str, str]
    unobservable_channels: dict[str, int]

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
    """What the monitor makes of what it has seen.

    Attributes:
        state: Without a reference profile ``"warming"`` until the window holds enough samples, then ``"ok"`` or
            ``"shifted"``, or ``"blind"`` if no layer can be judged: none has finite running statistics, or only
            non-finite values came. With one, the detector's: see :class:`guardserve.monitor.Detection`.
        samples: Samples seen so far.
        score: Largest layer Wasserstein-2 distance in the window, in running standard deviations; None while
            the window holds too few samples.
        threshold: The score from which on the window counts as shifted, without a reference.
        layer: The layer with that distance; with a reference, the earliest layer that left its null, None
            before the first alarm.
        window: What the window shows.
        evidence: With a reference, the largest evidence of a chart after the last sample; else None.
        evidence_threshold: The evidence from which on there is an alarm; None without a reference.
        alarms: Alarms raised with a reference.
        alarm_at: The sample, counted from 1, at which the last of them was raised; None before the first.
        channels: The channels of ``layer`` that moved most, with their direction, with a reference.
        reading: What the shift looks like, in a few words; empty before the first alarm.
        layers: With a reference, the evidence of each layer after the last sample, as a share of what raises an alarm.
    """

    state: State
    samples: int
    score: float | None
    threshold: float
    layer: str | None
    window: Snapshot
    evidence: float | None = None
    evidence_threshold: float | None = None
    alarms: int = 0
    alarm_at: int | None = None
    channels: tuple[MovedChannel, ...] = ()
    reading: str = ""
    layers: Mapping[str, float] = field(default_factory=dict)
