"""What a referenced monitor reads off a forward: one row of features for each sample, all layers side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from guardserve.batchnorm import ObservationPoint
from guardserve.monitor.taps import Record

Array = npt.NDArray[np.float32]


class FeatureReader:
    """Turns the readings of forwards into features: the channel means of ``z`` in every layer, then its deviations.

    Args:
        points: The layers, in execution order.
        indices: The index by which a reading refers to each of them.
    """

    def __init__(self, points: Sequence[ObservationPoint], indices: Sequence[int]) -> None:
        self._indices = tuple(indices)
        affine = [point.affine for point in points]
        # a factor of 0 makes an unobservable channel a constant 0
        factors = [torch.where(scale.isnan(), 0.0, 1 / scale) for scale, _ in affine]
        self.channels = tuple(len(factor) for factor in factors)
        self._factor = torch.cat(factors).float().numpy()
        self._abs_factor = np.abs(self._factor)
        self._location = torch.cat([location for _, location in affine]).float().numpy()

    def complete(self, record: Record) -> bool:
        """Tell whether a forward showed every layer, each with one row a sample."""
        ran = {index for index, _, _ in record.readings}
        odd = {index for index, mean, _ in record.readings if mean.shape[0] != record.samples}
        return all(index in ran and index not in odd for index in self._indices)

    def read(self, records: Sequence[Record]) -> Array:
        """Return the features of complete records, float32 of shape ``(N, 2 * sum of channels)``.

        A layer that ran several times in one forward counts with the mean over its runs.
        """
        rows = [self._row(record) for record in records]
        mean = np.concatenate([mean for mean, _ in rows])
        variance = np.concatenate([variance for _, variance in rows])
        channels = len(self._factor)
        features = np.empty((len(mean), 2 * channels), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(mean, self._location, out=features[:, :channels])
            features[:, :channels] *= self._factor
            np.sqrt(variance, out=features[:, channels:])
            features[:, channels:] *= self._abs_factor
        return features

    def _row(self, record: Record) -> tuple[Array, Array]:
        pairs = [(mean, variance) for _, mean, variance in record.readings]
        if tuple(index for index, _, _ in record.readings) != self._indices:
            found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for index, mean, variance in record.readings:
                found.setdefault(index, []).append((mean, variance))
            pairs = [_average(found[index]) for index in self._indices]
        means, variances = (torch.cat(part, 1).detach().float().cpu().numpy() for part in zip(*pairs, strict=True))
        return means, variances


def execution_order(record: Record) -> list[int]:
    """List the layers that ran in a forward, by the index of their first reading, as they ran."""
    return list(dict.fromkeys(index for index, _, _ in record.readings))


def fingerprint(points: Sequence[ObservationPoint]) -> str:
    """Hash what makes ``z`` mean the same: each layer's name, epsilon, running statistics and affine parameters."""
    digest = hashlib.sha256()
    for point in sorted(points, key=lambda point: point.name):
        layer = point.layer
        digest.update(f"{point.name}\0{layer.eps!r}\0".encode())
        constants: dict[str, torch.Tensor | None] = {
            name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")
        }
        for name, value in constants.items():
            if value is None:  # without affine parameters it scales by 1 and adds 0, as its fused form says
                value = torch.full_like(point.affine[1], float(name == "weight"))  # noqa: PLW2901
            digest.update(name.encode() + value.detach().float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _average(runs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(runs) == 1:
        return runs[0]
    return torch.stack([mean for mean, _ in runs]).mean(0), torch.stack([variance for _, variance in runs]).mean(0)
