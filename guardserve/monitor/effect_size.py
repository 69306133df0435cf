"""How far live activations are from a BatchNorm layer's running statistics.

These are effect sizes, not tests: they have no null distribution, and thresholds on them are rules of thumb.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guardserve.batchnorm import ObservationPoint
from guardserve.stats import Moments


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
        moments = self.moments.merge(other.moments)
        share = other.moments.count.double() / moments.count.clamp(min=1)
        return LayerMoments(
            self.samples + other.samples,
            self.nonfinite_samples + other.nonfinite_samples,
            moments,
            self.within + (other.within - self.within) * share,
        )


def layer_shift(point: ObservationPoint, seen: LayerMoments, worst: int) -> LayerShift:
    """Compare what a layer has accumulated with its running statistics.

    The live variance is that over samples of their means plus the mean of their variances. Where not all positions
    are read, the one grows by as much as the other shrinks, so that the sum is that of all positions.

    Args:
        point: The layer.
        seen: Its accumulated moments, with at least one finite value in some channel; a channel without any
            is left out, and with none at all the effect sizes are NaN.
        worst: How many channels to name.
    """
    expected = point.expected_variance
    mean_shift = seen.moments.mean
    variance = seen.within + seen.moments.variance
    log_std_ratio = 0.5 * (variance + 1 - expected).log()
    spread = variance.sqrt() - expected.clamp(min=0).sqrt()
    wasserstein2 = (mean_shift.square() + spread.square()).sqrt()
    known = (seen.moments.count > 0) & wasserstein2.isfinite()
    order = torch.where(known, wasserstein2, -1).argsort(descending=True)[: min(worst, int(known.sum()))].tolist()
    rms = [float(size[known].square().mean().sqrt()) for size in (mean_shift, log_std_ratio, wasserstein2)]
    return LayerShift(
        rms[0],
        rms[1],
        rms[2],
        name=point.name,
        channels=len(mean_shift),
        samples=seen.samples,
        nonfinite_samples=seen.nonfinite_samples,
        worst_channels=tuple(
            ChannelShift(float(mean_shift[i]), float(log_std_ratio[i]), float(wasserstein2[i]), channel=i)
            for i in order
        ),
    )
