"""From features to short whitened vectors: standardise and clip, sketch, whiten, clip the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from guardserve.observation.features import Array

CLIP = 8.0
"""A standardised feature is held within this many reference standard deviations."""

SPREAD_FLOOR = 1e-3
"""Smallest standard deviation that a feature is divided by, in units of ``z``: below it there is only rounding."""

EIGENVALUE_FLOOR = 1e-4
"""Smallest variance of a direction before whitening, relative to their mean or 1: below it there is only rounding."""

SHRINKAGE = 0.5
"""Share of Ledoit and Wolf's shrinkage that whitening uses.

Theirs minimises the error of the covariance, to which directions of small variance hardly matter; to a shift they
matter most, and there it flattens more than it steadies.
"""

ROWS = 256
"""Rows that are whitened at once: a product of this size is not yet worth several threads to any BLAS."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Shortens each layer's features to at most ``width`` sums of standardised features with random signs.

    A count sketch (Charikar, Chen, Farach-Colton 2002): inner products survive in expectation. A bucket takes every
    k-th channel, because their order means nothing: half of the buckets sum means, half deviations.

    Attributes:
        channels: Channels of each layer.
        width: Most sums of one layer, an even number.
        centre: Reference mean of each feature: all means of all layers, then all deviations.
        scale: Its reference standard deviation, times its random sign.
    """

    channels: tuple[int, ...]
    width: int
    centre: Array
    scale: Array

    @classmethod
    def fit(cls, features: Array, channels: Sequence[int], width: int, rng: np.random.Generator) -> Sketch:
        """Take centre and scale from finite features of shape ``(N, F)``."""
        scale = np.maximum(features.std(0, dtype=np.float64), SPREAD_FLOOR) * rng.choice([-1.0, 1.0], features.shape[1])
        centre = features.mean(0, dtype=np.float64)
        return cls(tuple(channels), width, centre.astype(np.float32), scale.astype(np.float32))

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Number of sums of each layer."""
        return tuple(2 * min(self.width // 2, count) for count in self.channels)

    @property
    def varies(self) -> bool:
        """Whether any feature did in the reference, by more than rounding."""
        return bool((np.abs(self.scale) > np.float32(SPREAD_FLOOR)).any())

    def standardise(self, features: Array, out: Array | None = None) -> Array:
        """Return features in clipped reference standard deviations, each times its sign; into ``out`` if given."""
        z: Array = np.subtract(features, self.centre, out=out)
        z *= self._factor
        return np.clip(z, np.float32(-CLIP), np.float32(CLIP), out=z)

    def project(self, standardised: Array) -> Array:
        """Sum standardised features to shape ``(N, layers, width)``; what a narrow layer does not fill is 0."""
        rows = len(standardised)
        if rows == 1:  # one call counts for more than one number
            row = np.bincount(self._slots, standardised[0], len(self.channels) * self.width)
            return row.astype(np.float32).reshape(1, len(self.channels), self.width)
        out = np.zeros((rows, len(self.channels) * self.width), np.float32)
        for start, whole, stop, slot, buckets in self._runs:
            sums = out[:, slot : slot + buckets]
            terms = standardised[:, start:whole].reshape(rows, (whole - start) // buckets, buckets)
            np.add.reduce(terms, axis=1, out=sums)
            if whole < stop:
                sums[:, : stop - whole] += standardised[:, whole:stop]
        return out.reshape(rows, len(self.channels), self.width)

    def fold(self, projected: Array, narrow: Sketch) -> Array:
        """Make of what :meth:`project` gave what ``narrow`` would give, whose width is a part of this one's."""
        out = np.zeros((len(projected), len(self.channels), narrow.width), np.float32)
        for layer, (old, new) in enumerate(zip(self.dimensions, narrow.dimensions, strict=True)):
            for half in (0, 1):
                for bucket in range(old // 2):
                    sums = out[:, layer, half * (new // 2) + bucket % (new // 2)]
                    sums += projected[:, layer, half * (old // 2) + bucket]
        return out

    @cached_property
    def _runs(self) -> list[tuple[int, int, int, int, int]]:
        """Of each layer's means and deviations: the start, where they no longer fill all buckets, and the end.

        Then where their sums go, and the number of buckets.
        """
        runs, offset = [], 0
        for half in (0, 1):
            for layer, (channels, dimensions) in enumerate(zip(self.channels, self.dimensions, strict=True)):
                buckets, stop = dimensions // 2, offset + channels
                runs.append((offset, stop - channels % buckets, stop, layer * self.width + half * buckets, buckets))
                offset = stop
        return runs

    @cached_property
    def _slots(self) -> npt.NDArray[np.intp]:
        """Where each feature's sum goes."""
        slots = [slot + np.arange(stop - start) % buckets for start, _, stop, slot, buckets in self._runs]
        return np.concatenate(slots)

    @cached_property
    def _factor(self) -> Array:
        return (1 / self.scale).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Gives each layer's sketch mean 0 and covariance 1 in the reference.

    Attributes:
        mean: Reference mean, shape ``(layers, width)``.
        matrix: Symmetric inverse square root of the reference covariance, shape ``(layers, width, width)``.
    """

    mean: Array
    matrix: Array

    @classmethod
    def fit(cls, sketches: Array, dimensions: Sequence[int]) -> Whitening:
        """Estimate mean and shrunk covariance from sketches of shape ``(N, layers, width)``."""
        _, layers, width = sketches.shape
        mean = sketches.mean(0, dtype=np.float64)
        matrix = np.zeros((layers, width, width))
        for layer, count in enumerate(dimensions):
            covariance = ledoit_wolf(sketches[:, layer, :count] - mean[layer, :count], SHRINKAGE)
            values, vectors = np.linalg.eigh(covariance)
            values = np.maximum(values, EIGENVALUE_FLOOR * max(float(values.mean()), 1.0))
            matrix[layer, :count, :count] = vectors / np.sqrt(values) @ vectors.T
        return cls(mean.astype(np.float32), matrix.astype(np.float32))

    def principal_variance(self, dimensions: Sequence[int]) -> Array:
        """Return each layer's reference variance along its samples' own differences: the mean, weighted by itself."""
        deviations = [1 / np.linalg.eigvalsh(own[:n, :n]) for own, n in zip(self.matrix, dimensions, strict=True)]
        return np.array([(own**4).sum() / (own**2).sum() for own in deviations], np.float32)

    def apply(self, sketches: Array) -> Array:
        """Return whitened sketches, shape ``(N, layers, width)``."""
        white = np.empty_like(sketches)
        for start in range(0, len(sketches), ROWS):
            rows = slice(start, start + ROWS)
            centred = (sketches[rows] - self.mean).transpose(1, 0, 2)
            white[rows] = (centred @ self.matrix).transpose(1, 0, 2)
        return white


def ledoit_wolf(centred: Array, share: float = 1.0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the covariance of centred samples, shape ``(N, D)``, shrunk towards a multiple of the identity.

    The weight of the identity is ``share`` times the one of Ledoit and Wolf (2004), "A well-conditioned estimator
    for large-dimensional covariance matrices".
    """
    x = centred.astype(np.float64)
    count, width = x.shape
    sample = x.T @ x / count
    target = np.trace(sample) / width
    distance = np.square(sample - target * np.eye(width)).sum()
    error = (np.square(x).sum(1) @ np.square(x).sum(1) / count - np.square(sample).sum()) / count
    weight = 1.0 if distance <= 0 else share * min(1.0, error / distance)
    shrunk: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (1 - weight) * sample
    shrunk[np.diag_indices(width)] += weight * target
    return shrunk


def lengths(vectors: Array) -> Array:
    """Return the length of each layer's vector, at least the smallest positive number: shape ``(N, layers)``."""
    square: Array = np.einsum("nld,nld->nl", vectors, vectors)
    return np.maximum(np.sqrt(square, out=square), np.finfo(np.float32).tiny, out=square)


def shorten(vectors: Array, radius: Array, length: Array | None = None) -> Array:
    """Scale vectors of shape ``(N, layers, width)`` down to length ``radius``, one for each layer."""
    scale = np.minimum(np.float32(1), radius / (lengths(vectors) if length is None else length))
    shortened: Array = vectors * scale[:, :, None]
    return shortened
