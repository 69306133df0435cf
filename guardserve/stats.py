"""Streaming moments that merge: two parts of a stream, in any order, give what the whole stream gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream of equally shaped samples, element by element.

    Values are float64 on the CPU. A non-finite value is left out of its own element only, so one NaN
    never poisons a statistic; ``count`` says how many values each element has taken.

    Updates and merges follow Chan, Golub and LeVeque (1983), "Algorithms for computing the sample
    variance", which never subtracts large sums from each other.

    >>> left, right = Moments.of(torch.tensor([[1.0], [2.0]])), Moments.of(torch.tensor([[6.0]]))
    >>> both = left.merge(right)
    >>> both.count.item(), both.mean.item(), both.variance.item()
    (3, 3.0, 4.666666666666667)

    Attributes:
        count: Number of values seen, int64, shape ``(*S)``.
        mean: Their mean, float64, shape ``(*S)``; 0 where the count is 0.
        m2: Sum of their squared deviations from the mean, float64, shape ``(*S)``.
    """

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Moments:
        """Return the moments of no samples at all: the identity of :meth:`merge`."""
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(torch.zeros(shape, dtype=torch.int64), zeros, zeros)

    @classmethod
    def of(cls, samples: torch.Tensor) -> Moments:
        """Return the moments of a batch of samples.

        Args:
            samples: Shape ``(N, *S)``, any real dtype, any device; N may be 0.
        """
        values = samples.detach().to("cpu", torch.float64)
        finite = values.isfinite()
        count = finite.sum(0)
        mean = torch.where(finite, values, 0.0).sum(0) / count.clamp(min=1)
        deviation = torch.where(finite, values - mean, 0.0)
        return cls(count, mean, deviation.square().sum(0))

    def update(self, samples: torch.Tensor) -> Moments:
        """Return the moments of this stream continued by ``samples``, of shape ``(N, *S)``."""
        return self.merge(Moments.of(samples))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both streams together.

        Raises:
            ValueError: If the two have different shapes.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge moments of shape {tuple(other.mean.shape)} into shape {tuple(self.mean.shape)}: "
                "they come from different layers or models"
            )
        count = self.count + other.count
        share = other.count.double() / count.clamp(min=1)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * self.count * share,
        )

    @property
    def variance(self) -> torch.Tensor:
        """Population variance, float64, shape ``(*S)``; 0 where the count is 0."""
        return self.m2 / self.count.clamp(min=1)
