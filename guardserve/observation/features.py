"""What a referenced monitor reads off a forward: one row of features for each sample, all layers side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from guardserve.batchnorm import ObservationPoint
from guardserve.observation.reading import Reading, Rows
from guardserve.observation.record import Record
from guardserve.observation.workspace import Layout

Array = npt.NDArray[np.float32]


class FeatureReader:
    """Turns the readings of forwards into features: the channel means of ``z`` in every layer, then its deviations.

    Args:
        points: The layers, in execution order.
        indices: The index by which a reading refers to each of them.
    """

    def __init__(self, points: Sequence[ObservationPoint], indices: Sequence[int]) -> None:
        self._indices = tuple(indices)
        self._picked: dict[tuple[int, ...], npt.NDArray[np.intp]] = {}
        affine = [point.affine for point in points]
        # a factor of 0 makes an unobservable channel a constant 0
        factors = [torch.where(scale.isnan(), 0.0, 1 / scale) for scale, _ in affine]
        self.channels = tuple(len(factor) for factor in factors)
        self._factor = torch.cat(factors).float().numpy()
        self._abs_factor = np.abs(self._factor)
        offsets = [
            torch.where(location.isfinite(), point.anchor.double().cpu() - location, 0.0)
            for point, (_, location) in zip(points, affine, strict=True)
        ]
        self._offset = torch.cat(offsets).float().numpy()

    def complete(self, record: Record) -> bool:
        """Tell whether a forward showed every layer, each with one row a sample."""
        if record.order == self._indices and record.whole:
            return True
        ran = set(record.order)
        odd = {reading.index for reading in record.readings if len(reading.total) != record.samples}
        return all(index in ran and index not in odd for index in self._indices)

    def read(self, records: Sequence[Record]) -> Array:
        """Return the features of complete records, float32 of shape ``(N, 2 * sum of channels)``.

        A layer that ran several times in one forward counts with the mean over its runs.
        """
        rows = [self._rows(record) for record in records]
        channels = len(self._factor)
        features = np.empty((sum(len(mean) for mean, _ in rows), 2 * channels), np.float32)
        first = 0
        with np.errstate(invalid="ignore", over="ignore"):
            for mean, variance in rows:
                block = features[first : first + len(mean)]
                first += len(mean)
                np.add(mean, self._offset, out=block[:, :channels], casting="same_kind")
                if variance is None:
                    block[:, channels:] = 0
                else:
                    np.sqrt(variance, out=block[:, channels:], casting="same_kind")
            features[:, :channels] *= self._factor
            features[:, channels:] *= self._abs_factor
        return features

    def _rows(self, record: Record) -> Rows:
        if record.bundle is not None:
            rows, columns = record.rows(), self._columns(record.bundle)
            if columns is None:
                return rows
            return Rows(rows.mean[:, columns], None if rows.variance is None else rows.variance[:, columns])
        if record.order == self._indices and record.whole:
            return record.rows()
        runs: dict[int, list[Reading]] = {}
        for reading in record.readings:
            runs.setdefault(reading.index, []).append(reading)
        parts = [[_filled(record.rows_of([run])) for run in runs[index]] for index in self._indices]
        means, variances = ([sum(run[i] for run in part) / len(part) for part in parts] for i in (0, 1))
        return Rows(np.concatenate(means, axis=1), np.concatenate(variances, axis=1))

    def _columns(self, bundle: Layout) -> npt.NDArray[np.intp] | None:
        """Return where a bundle has the channels of the layers, in order; None if it has just these."""
        if bundle.route == self._indices:
            return None
        columns = self._picked.get(bundle.route)
        if columns is None:
            ends = dict(zip(bundle.route, accumulate(bundle.widths), strict=True))
            parts = [
                np.arange(ends[index] - width, ends[index])
                for index, width in zip(self._indices, self.channels, strict=True)
            ]
            columns = self._picked[bundle.route] = np.concatenate(parts)
        return columns


def _filled(rows: Rows) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.floating[Any]]]:
    return rows.mean, np.zeros_like(rows.mean) if rows.variance is None else rows.variance


def execution_order(record: Record) -> list[int]:
    """List the layers that ran in a forward, by the index of their first reading, as they ran."""
    return list(dict.fromkeys(record.order))


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
