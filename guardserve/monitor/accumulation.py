"""What a stretch of the stream adds up to, for all layers at once."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from guardserve.batchnorm import ObservationPoint
from guardserve.monitor.effect_size import LayerMoments
from guardserve.observation.reading import Rows
from guardserve.observation.record import Record
from guardserve.observation.workspace import NATIVE
from guardserve.stats import Moments

if NATIVE:
    from guardserve.native import add_up

_AT_ONCE = 64
"""Rows that are added up in their own type: it rounds like this many additions."""

_TOGETHER = 2**18
"""Values that are summed up together, about."""

ROUTES = 8
"""Ways through a model whose layers are kept side by side; those of any further way are kept one by one."""


@dataclass(frozen=True)
class RouteMoments:
    """What the layers of one way through the model have accumulated, side by side; two of them merge.

    Attributes:
        nonfinite_samples: Samples with a non-finite activation, for each layer.
        together: All layers as if they were one, except for these.
    """

    nonfinite_samples: npt.NDArray[np.int64]
    together: LayerMoments

    def merge(self, other: RouteMoments) -> RouteMoments:
        """Return what both have accumulated together."""
        return RouteMoments(self.nonfinite_samples + other.nonfinite_samples, self.together.merge(other.together))


class Scale:
    """Standardises what the layers of a route showed by their constants.

    Args:
        points: The layers, in the order in which their channels are side by side.
    """

    def __init__(self, points: Sequence[ObservationPoint]) -> None:
        self._points = points
        self._constants = constants_of(points)
        scales, locations = zip(*[point.affine for point in points], strict=True)
        self.ends = list(accumulate(map(len, scales)))
        scale, location = torch.cat(scales), torch.cat(locations)
        known = scale.isfinite() & location.isfinite()
        scale = scale.where(known, torch.inf)  # by which all of the others are 0
        location = location.where(known, 0.0)
        anchor = torch.cat([point.anchor.double().cpu() for point in points])
        self._columns = torch.stack([known.double(), anchor - location, scale]).numpy()

    def is_current(self) -> bool:
        """Tell whether the layers still have the constants that it was made from."""
        return same_constants(self._constants, constants_of(self._points))

    def moments(self, rows: list[Rows]) -> RouteMoments:
        """Standardise and summarise rows; values that are not finite, or their squares, are left out of a channel."""
        samples = sum(len(part.mean) for part in rows)
        made = np.empty((4, self.ends[-1]))
        plain = NATIVE and all(part.mean.dtype == np.float32 for part in rows)
        if plain and add_up(rows, self._columns, made):
            bad, count, mean, squares, within = np.zeros(len(self.ends), np.int64), made[0].view(np.int64), *made[1:]
        else:
            bad, count, mean, squares, within = self._moments(rows, samples)
        moments = Moments(*map(torch.from_numpy, (count, mean, squares)))
        return RouteMoments(bad, LayerMoments(samples, 0, moments, torch.from_numpy(within)))

    def _moments(self, rows: Sequence[Rows], samples: int) -> tuple[npt.NDArray[Any], ...]:
        """Do that by numpy's operations, with values that are not finite among them."""
        known, offset, scale = self._columns
        bad = np.zeros(len(self.ends), np.int64)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = _finite_sums(rows, samples)
            if sums is None:
                finite = np.concatenate([np.isfinite(part.mean) & np.isfinite(_spread(part)) for part in rows])
                bad += samples - np.logical_and.reduceat(finite, [0, *self.ends[:-1]], axis=1).sum(0)
                sums = _sums_without(rows, finite)
        # few operations: each hands the interpreter over to the forwards, and asks for it again
        count = (known * sums.number).astype(np.int64)
        mean, squares, within = sums[1:]
        mean += offset
        mean *= np.greater(sums.number, 0)
        mean /= scale
        squares /= scale**2
        within /= scale**2
        within /= np.maximum(sums.number, 1)
        return bad, count, mean, squares, within

    def layer(self, position: int, seen: RouteMoments) -> LayerMoments:
        """Take one layer out of what a route has accumulated."""
        part = slice(self.ends[position - 1] if position else 0, self.ends[position])
        moments = seen.together.moments
        return LayerMoments(
            seen.together.samples,
            int(seen.nonfinite_samples[position]),
            Moments(moments.count[part], moments.mean[part], moments.m2[part]),
            seen.together.within[part],
        )


class _Sums(NamedTuple):
    """Rows summed up in float64, each of shape ``(sum of C,)``.

    Attributes:
        number: Number of values, the same everywhere if it is one.
        average: Their mean.
        squares: Squared deviations from it, summed up.
        within: Variances over positions, summed up.
    """

    number: npt.NDArray[np.int64] | int
    average: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    within: npt.NDArray[np.float64]


def _finite_sums(rows: Sequence[Rows], samples: int) -> _Sums | None:
    """Sum rows up, as many columns together as memory is cheap for; None if a value or a sum is not finite."""
    columns = rows[0].mean.shape[1]
    sums = _Sums(samples, *[np.zeros(columns) for _ in range(3)])
    spread = any(part.variance is not None for part in rows)
    width = max(1, _TOGETHER // max(1, samples))
    for start in range(0, columns, width):
        here = slice(start, start + width)
        mean = np.concatenate([part.mean[:, here] for part in rows])
        # deviations from the first sample, then from the mean, so that their own type is exact enough
        first = mean[0].copy()
        mean -= first
        rest = _total(mean) / samples
        np.add(first, rest, out=sums.average[here])
        mean -= rest.astype(mean.dtype)
        sums.squares[here] = _total(np.square(mean, out=mean))
        if spread:
            sums.within[here] = _total(np.concatenate([_spread(part)[:, here] for part in rows]))
    return sums if math.isfinite(sums.average.sum() + sums.squares.sum() + sums.within.sum()) else None


def _sums_without(rows: Sequence[Rows], finite: npt.NDArray[np.bool_]) -> _Sums:
    """Sum rows up without their non-finite values, in a type in which the squares of all others are finite."""
    mean = np.concatenate([part.mean for part in rows], dtype=np.float64)
    variance = np.concatenate([_spread(part) for part in rows])
    count = finite.sum(0)
    average = mean.sum(0, where=finite) / np.maximum(count, 1)
    mean -= average
    mean[~finite] = 0
    squares: npt.NDArray[np.float64] = np.einsum("nc,nc->c", mean, mean)
    return _Sums(count, average, squares, variance.sum(0, dtype=np.float64, where=finite))


def _spread(rows: Rows) -> npt.NDArray[np.floating[Any]]:
    return np.zeros_like(rows.mean) if rows.variance is None else rows.variance


def _total(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Add rows up, some in their own type, which is faster, and those sums in float64."""
    blocks = len(values) // _AT_ONCE
    whole = values[: blocks * _AT_ONCE].reshape(blocks, _AT_ONCE, values.shape[1])
    total: npt.NDArray[np.float64] = np.add.reduce(values[blocks * _AT_ONCE :], 0).astype(np.float64)
    if blocks:
        total += np.add.reduce(np.add.reduce(whole, 1), 0, dtype=np.float64)
    return total


class Scales:
    """The scale of each route that was met, made anew when the layers' constants have moved.

    Args:
        points: All observation points; routes refer to them by index.
    """

    def __init__(self, points: Sequence[ObservationPoint]) -> None:
        self._points = points
        self._scales: dict[tuple[int, ...], Scale] = {}

    def __getitem__(self, route: tuple[int, ...]) -> Scale:
        """Return the scale of a route whose layers are readable."""
        scale = self._scales.get(route)
        if scale is None or not scale.is_current():
            scale = self._scales[route] = Scale([self._points[index] for index in route])
        return scale

    def prepare(self, seen: Seen) -> Seen:
        """Return what is known of readable layers, once there is a scale for it: another process may have seen it."""
        routes = {route: moments for route, moments in seen.routes.items() if self.readable(route)}
        for route in routes:
            self[route]
        return replace(seen, routes=routes)

    def readable(self, route: tuple[int, ...]) -> bool:
        """Tell whether the layers of a route have running statistics still."""
        return all(self._points[index].readable for index in route)

    def layer(self, route: tuple[int, ...], position: int, seen: RouteMoments) -> LayerMoments:
        """Take one layer out of what a route has accumulated."""
        return self._scales[route].layer(position, seen)

    def routes(self, record: Record) -> list[tuple[tuple[int, ...], Rows]]:
        """Divide a forward up into routes: one, unless the forward ran a layer twice or it is one way too many."""
        if record.whole and (record.route in self._scales or len(self._scales) < ROUTES):
            return [(record.route, record.view())]
        return [((index,), rows) for index, rows in record.parts()]


@dataclass
class Seen:
    """What has been accumulated over a stretch of the stream; two of them merge.

    Attributes:
        whole: Samples of whole forwards.
        parts: Samples that each layer saw when a part of the model was called by itself.
        routes: What each route has accumulated.
        ended: When the last of it was accumulated, by the monotonic clock.
    """

    whole: int = 0
    parts: Counter[int] = field(default_factory=Counter)
    routes: dict[tuple[int, ...], RouteMoments] = field(default_factory=dict)
    ended: float = -math.inf

    @classmethod
    def of(cls, records: Sequence[Record], scales: Scales) -> Seen:
        """Summarise what some forwards showed."""
        seen = cls(ended=time.monotonic())
        found: dict[tuple[int, ...], list[Rows]] = {}
        for record in records:
            if record.samples is None:
                seen.parts.update({record.readings[0].index: record.count})
            else:
                seen.whole += record.samples
            for route, rows in scales.routes(record):
                found.setdefault(route, []).append(rows)
        for route, several in found.items():
            if scales.readable(route):
                seen.add(route, scales[route].moments(several))
        return seen

    @property
    def samples(self) -> int:
        """Number of samples: those of whole forwards, and those of parts as the layer that saw most has them."""
        return self.whole + max(self.parts.values(), default=0)

    def merge(self, other: Seen) -> None:
        """Take in what another has seen."""
        self.ended = max(self.ended, other.ended)
        self.whole += other.whole
        self.parts.update(other.parts)
        for route, moments in other.routes.items():
            self.add(route, moments)

    def add(self, route: tuple[int, ...], moments: RouteMoments) -> None:
        """Take in what has been seen of one route; the samples are counted elsewhere."""
        mine = self.routes.get(route)
        self.routes[route] = moments if mine is None else mine.merge(moments)

    def layers(self, scales: Scales) -> dict[int, LayerMoments]:
        """Return what each layer has accumulated, by its index, in registration order."""
        found: dict[int, LayerMoments] = {}
        for route, moments in self.routes.items():
            for position, index in enumerate(route):
                layer = scales.layer(route, position, moments)
                found[index] = found[index].merge(layer) if index in found else layer
        return dict(sorted(found.items()))


Constants: TypeAlias = list[tuple[torch.Tensor | None, int | None]]


def same_constants(before: Constants, now: Constants) -> bool:
    """Tell whether constants are the same tensors still, and unchanged as far as torch tells."""
    return all(
        now_tensor is tensor and (tensor is None or now_version == version is not None)
        for (tensor, version), (now_tensor, now_version) in zip(before, now, strict=True)
    )


def constants_of(points: Sequence[ObservationPoint]) -> Constants:
    """List what standardisation depends on, with its version; an inference tensor has none."""
    tensors = [tensor for point in points for tensor in point.constants]
    return [(tensor, None if tensor is None or tensor.is_inference() else tensor._version) for tensor in tensors]  # noqa: SLF001
