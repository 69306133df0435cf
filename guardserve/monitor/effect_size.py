"""How far live activations are from a BatchNorm layer's running statistics.

These are effect sizes, not tests: they have no null distribution, and thresholds on them are rules of thumb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from guardserve.batchnorm import ObservationPoint
from guardserve.observation.workspace import NATIVE
from guardserve.stats import Moments

if NATIVE:
    from guardserve.native import merge_moments


@dataclass(frozen=True)
class EffectSize:
    """Distance between two normal distributions per channel, in running standard deviations.

    With ``s^2 = running_var + eps``, live mean ``m`` and live variance ``v``:

    Attributes:
        mean_shift: ``(m - running_mean) / s``.
        log_std_ratio: ``log sqrt((v + eps) / s^2)``; positive where activations spread wider.
        wasserstein2: ``sqrt((m - running_mean)^2 + (sqrt(v) - sqrt(running_var))^2) / s``: the 2-Wasserstein
            distance between the two normal distributions (Schneider et al. 2020, arXiv:2006.16971, eq. 5).
    """

    mean_shift: float
    log_std_ratio: float
    wasserstein2: float


@dataclass(frozen=True)
class ChannelShift(EffectSize):
    """The effect size in one channel.

    Attributes:
        channel: Index of the channel.
    """

    channel: int


@dataclass(frozen=True)
class LayerShift(EffectSize):
    """The effect size in one layer: root mean square over its channels.

    Attributes:
        name: Qualified name of the layer.
        channels: Number of channels.
        samples: Number of samples that it has seen.
        nonfinite_samples: Those of them with a non-finite activation in any channel, which is left out.
        worst_channels: The channels with the largest Wasserstein-2 distance, worst first.
    """

    name: str
    channels: int
    samples: int
    nonfinite_samples: int
    worst_channels: tuple[ChannelShift, ...]


@dataclass(frozen=True)
class LayerMoments:
    """What one layer has accumulated; two of them merge.

    Attributes:
        samples: Number of samples.
        nonfinite_samples: Samples with a non-finite activation in any channel.
        moments: Moments over samples, shape ``(C,)``, of the mean of ``z = (x - running_mean) / s`` over positions.
        within: Mean over samples of the variance of ``z`` over positions, float64, shape ``(C,)``.
    """

    samples: int
    nonfinite_samples: int
    moments: Moments
    within: torch.Tensor

    def merge(self, other: LayerMoments) -> LayerMoments:
        """Return what both have accumulated together."""
        samples = self.samples + other.samples
        bad = self.nonfinite_samples + other.nonfinite_samples
        if NATIVE:
            made = [torch.empty_like(tensor) for tensor in self._tensors]
            if merge_moments(self._tensors, other._tensors, tuple(made)):
                return LayerMoments(samples, bad, Moments(*made[:3]), made[3])
        moments = self.moments.merge(other.moments)
        share = other.moments.count.double() / moments.count.clamp(min=1)
        return LayerMoments(samples, bad, moments, self.within + (other.within - self.within) * share)

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        moments = self.moments
        return moments.count, moments.mean, moments.m2, self.within


def layer_shifts(layers: Sequence[tuple[ObservationPoint, LayerMoments]], worst: int) -> tuple[LayerShift, ...]:
    """Compare what layers have accumulated with their running statistics, all at once.

    The live variance is that over samples of their means plus the mean of their variances. Where not all positions
    are read, the one grows by as much as the other shrinks, so that the sum is that of all positions.

    Args:
        layers: Each layer and its accumulated moments, with at least one finite value in some channel; a channel
            without any is left out, and with none at all the effect sizes are NaN.
        worst: How many channels of each to name.
    """
    if not layers:
        return ()
    ends = list(accumulate(len(seen.within) for _, seen in layers))
    starts = [0, *ends[:-1]]
    expected = torch.cat([point.expected_variance for point, _ in layers]).numpy()
    count, mean_shift, m2 = (
        torch.cat(part).numpy()
        for part in zip(*[(seen.moments.count, seen.moments.mean, seen.moments.m2) for _, seen in layers], strict=True)
    )
    variance = torch.cat([seen.within for _, seen in layers]).numpy() + m2 / np.maximum(count, 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_std_ratio = 0.5 * np.log(variance + 1 - expected)
        wider = np.sqrt(variance) - np.sqrt(np.maximum(expected, 0))
        wasserstein2 = np.sqrt(np.square(mean_shift) + np.square(wider))
        known = (count > 0) & np.isfinite(wasserstein2)
        numbers = np.add.reduceat(known, starts, dtype=np.int64)
        sizes = [
            np.sqrt(np.add.reduceat(np.where(known, np.square(size), 0.0), starts) / numbers).tolist()
            for size in (mean_shift, log_std_ratio, wasserstein2)
        ]
    ranked = np.where(known, wasserstein2, -1.0)
    shifts = []
    for row, (point, seen) in enumerate(layers):
        start, end = starts[row], ends[row]
        order = start + _largest(ranked[start:end], min(worst, int(numbers[row])))
        named = zip(
            *[size[order].tolist() for size in (mean_shift, log_std_ratio, wasserstein2)],
            (order - start).tolist(),
            strict=True,
        )
        shifts.append(
            LayerShift(
                sizes[0][row],
                sizes[1][row],
                sizes[2][row],
                name=point.name,
                channels=end - start,
                samples=seen.samples,
                nonfinite_samples=seen.nonfinite_samples,
                worst_channels=tuple(
                    ChannelShift(mean, spread, distance, channel=channel) for mean, spread, distance, channel in named
                ),
            )
        )
    return tuple(shifts)


def _largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Return the indices of the largest values, the largest first."""
    order = np.argpartition(-values, count)[:count] if 0 < count < len(values) else np.arange(len(values))
    return order[np.argsort(-values[order], kind="stable")][:count]
