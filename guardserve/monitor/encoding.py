"""From features to short whitened vectors: standardise and clip, sketch, whiten, clip the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from guardserve.monitor.features import Array

CLIP = 8.0
"""A standardised feature is held within this many reference standard deviations."""

SPREAD_FLOOR = 1e-3
"""Smallest standard deviation that a feature is divided by, in units of ``z``: below it there is only rounding."""

EIGENVALUE_FLOOR = 1e-3
"""Smallest variance of a whitened direction before whitening, relative to the mean over directions."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Shortens each layer's features to at most ``width`` sums of standardised features with random signs.

    A count sketch (Charikar, Chen, Farach-Colton 2002): inner products survive in expectation. Its buckets are
    runs of neighbouring channels, because their order means nothing: half of them sum means, half deviations.

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

    def standardise(self, features: Array) -> Array:
        """Return features in clipped reference standard deviations, each times its sign."""
        z: Array = features - self.centre
        z *= self._factor
        np.minimum(z, np.float32(CLIP), out=z)
        return np.maximum(z, np.float32(-CLIP), out=z)

    def project(self, standardised: Array) -> Array:
        """Sum standardised features to shape ``(N, layers, width)``; what a narrow layer does not fill is 0."""
        starts, slots = self._buckets
        out = np.zeros((len(standardised), len(self.channels) * self.width), np.float32)
        out[:, slots] = np.add.reduceat(standardised, starts, axis=1)
        return out.reshape(len(standardised), len(self.channels), self.width)

    @cached_property
    def _factor(self) -> Array:
        return (1 / self.scale).astype(np.float32)

    @cached_property
    def _buckets(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Where each bucket starts, and where its sum goes."""
        starts, slots = [], []
        offset = 0
        for half in (0, 1):
            for layer, (channels, dimensions) in enumerate(zip(self.channels, self.dimensions, strict=True)):
                buckets = np.arange(dimensions // 2)
                starts.append(offset + buckets * channels // len(buckets))
                slots.append(layer * self.width + half * len(buckets) + buckets)
                offset += channels
        return np.concatenate(starts), np.concatenate(slots)


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
            covariance = ledoit_wolf(sketches[:, layer, :count] - mean[layer, :count])
            values, vectors = np.linalg.eigh(covariance)
            values = np.maximum(values, max(EIGENVALUE_FLOOR * values.mean(), np.finfo(np.float32).tiny))
            matrix[layer, :count, :count] = vectors / np.sqrt(values) @ vectors.T
        return cls(mean.astype(np.float32), matrix.astype(np.float32))

    def apply(self, sketches: Array) -> Array:
        """Return whitened sketches, shape ``(N, layers, width)``."""
        centred = (sketches - self.mean).transpose(1, 0, 2)
        return np.ascontiguousarray((centred @ self.matrix).transpose(1, 0, 2))


def ledoit_wolf(centred: Array) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the covariance of centred samples, shape ``(N, D)``, shrunk towards a multiple of the identity.

    The weight of the identity is the one of Ledoit and Wolf (2004), "A well-conditioned estimator for
    large-dimensional covariance matrices".
    """
    x = centred.astype(np.float64)
    count, width = x.shape
    sample = x.T @ x / count
    target = np.trace(sample) / width
    distance = np.square(sample - target * np.eye(width)).sum()
    error = (np.square(x).sum(1) @ np.square(x).sum(1) / count - np.square(sample).sum()) / count
    weight = 1.0 if distance <= 0 else min(1.0, error / distance)
    shrunk: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (1 - weight) * sample
    shrunk[np.diag_indices(width)] += weight * target
    return shrunk


def shorten(vectors: Array, radius: Array) -> Array:
    """Scale vectors of shape ``(N, layers, width)`` down to length ``radius``, one for each layer."""
    length = np.sqrt(np.einsum("nld,nld->nl", vectors, vectors))
    scale = np.minimum(1.0, radius / np.maximum(length, np.finfo(np.float32).tiny))
    shortened: Array = vectors * scale[:, :, None].astype(np.float32)
    return shortened
