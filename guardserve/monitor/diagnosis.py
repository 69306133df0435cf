"""What a shift looks like: which layer it starts at, which channels moved, and what kind of change that suggests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guardserve.monitor.features import Array
from guardserve.monitor.reference import ReferenceProfile

LOOK_BACK = 9
"""Samples up to an alarm that its diagnosis starts from: about what the fastest chart remembers."""

LASTING = 64
"""Samples after its alarm from which on a shift counts as lasting."""

SLOWEST = 0.01
"""Smallest weight of the newest sample in a diagnosis, so that it follows a shift that changes."""

CHANNELS = 5
"""How many channels a diagnosis names."""


@dataclass(frozen=True)
class MovedChannel:
    """A channel of the lead layer that moved.

    Attributes:
        channel: Its index.
        feature: What moved: its ``"mean"`` over the positions of a sample, or its ``"spread"`` (standard deviation).
        shift: How far and which way, in standard deviations between clean samples.
    """

    channel: int
    feature: str
    shift: float


class ShiftAverage:
    """Average of what came since shortly before an alarm, over standardised features and whitened vectors.

    Args:
        features: Standardised features of the samples up to the alarm, shape ``(n, F)``.
        vectors: Their whitened vectors, shape ``(n, layers, width)``.
    """

    def __init__(self, features: Array, vectors: Array) -> None:
        self.features, self.vectors = features.mean(0), vectors.mean(0)
        self.count = len(features)
        self.noise = 1 / self.count

    def update(self, features: Array, vectors: Array) -> None:
        """Take more samples: features ``(n, F)``, vectors ``(n, layers, width)``."""
        kept, weights = 1.0, np.zeros(len(features), np.float32)
        for row in range(len(features)):
            self.count += 1
            weight = max(1 / self.count, SLOWEST)
            kept *= 1 - weight
            weights *= np.float32(1 - weight)
            weights[row] = weight
            self.noise = (1 - weight) ** 2 * self.noise + weight**2
        self.features *= np.float32(kept)
        self.features += weights @ features
        self.vectors *= np.float32(kept)
        self.vectors += np.einsum("n,nld->ld", weights, vectors)

    def depth(self, profile: ReferenceProfile) -> Array:
        """Return how far each layer moved, in standard deviations of a clean sample, without chance's part."""
        dimensions = np.array(profile.sketch.dimensions, np.float32)
        square = np.square(self.vectors).sum(1) - dimensions * np.float32(self.noise)
        moved: Array = np.sqrt(np.maximum(0, square))
        return moved

    def layer_features(self, profile: ReferenceProfile, layer: int) -> tuple[Array, Array]:
        """Return how far the means and the spreads of a layer's channels moved, in clean standard deviations."""
        start, count = sum(profile.sketch.channels[:layer]), profile.sketch.channels[layer]
        moved = self.features * np.sign(profile.sketch.scale)
        means, spreads = np.split(moved, 2)
        return means[start : start + count], spreads[start : start + count]


def lead_layer(evidence: Array) -> int:
    """Find the earliest layer that left its null, given the evidence of each chart and layer, in execution order.

    A level of 1 is what a statistic exceeds in 1 of 1,000 clean samples. Eval-mode layers hand a shift on, so the
    earliest leads; when none is beyond its level, the one with most evidence does.
    """
    strongest = evidence.max(0)
    beyond = np.flatnonzero(strongest >= max(1.0, 0.25 * float(strongest.max())))
    return int(beyond[0]) if len(beyond) else int(strongest.argmax())


def moved_channels(average: ShiftAverage, profile: ReferenceProfile, layer: int) -> tuple[MovedChannel, ...]:
    """List the channels of a layer that moved most, each once, most first."""
    means, spreads = average.layer_features(profile, layer)
    order = np.argsort(-np.maximum(np.abs(means), np.abs(spreads)), kind="stable")[:CHANNELS]
    return tuple(
        MovedChannel(int(i), "mean", float(means[i]))
        if abs(means[i]) >= abs(spreads[i])
        else MovedChannel(int(i), "spread", float(spreads[i]))
        for i in order
    )


def describe(average: ShiftAverage, profile: ReferenceProfile, layer: int, age: int, *, over: bool) -> str:
    """Say what a shift looks like, in three parts.

    Where: an input that looks different moves early layers most, and a trained model damps it on the way, or moves
    them farther than any clean sample is from the mean; another mixture of classes moves late layers most. What: the
    means of the lead layer's channels, or their spread. How long: ``age`` samples since the alarm, ``over`` if it has
    ended.
    """
    if over:
        lasts = f"burst, over within {age} samples" if age < LASTING else f"lasted {age} samples"
    else:
        lasts = "lasting" if age >= LASTING else "just begun"
    return "; ".join(
        (
            _where(average.depth(profile), np.exp(profile.levels.median[-1])),
            _what(*average.layer_features(profile, layer)),
            lasts,
        )
    )


def _where(moved: Array, typical: Array) -> str:
    if len(moved) == 1:
        return "one layer only: input or classes"
    third = max(1, len(moved) // 3)
    early, late = float(moved[:third].mean()), float(moved[-third:].mean())
    # another mixture of clean samples cannot move their mean farther than they are from it themselves
    if early >= late or float((moved / typical)[:third].mean()) >= 1:
        return "input-level: " + (
            "early layers moved most" if early >= late else "early layers, too, left what is clean"
        )
    return "semantic or class mix: late layers moved most"


def _what(means: Array, spreads: Array) -> str:
    offset, scale = float(np.square(means).mean()), float(np.square(spreads).mean())
    if offset >= scale:
        return "offset: channel means moved"
    return f"scale: activations vary {'more' if float(spreads.mean()) > 0 else 'less'} within a sample"
