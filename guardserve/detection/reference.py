"""Reference profiles: what clean data look like to a model, and how often a detector is wrong about it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from guardserve.batchnorm import ObservationPoint
from guardserve.detection.calibration import (
    ARLS,
    FOLDS,
    Pool,
    RunLength,
    calibrate,
    dependent_run,
    measure,
)
from guardserve.detection.cautions import CARRIED, cautions
from guardserve.detection.chart import Levels
from guardserve.detection.collection import Collector, ReferenceData, collect
from guardserve.detection.encoding import Sketch, Whitening, lengths
from guardserve.detection.mixtures import Mixtures
from guardserve.detection.profile_file import Arrays, read_profile, write_profile
from guardserve.exceptions import ReferenceMismatchError, ReferenceProfileError
from guardserve.observation.features import Array, fingerprint
from guardserve.observation.reading import VALUES

MIN_SAMPLES = 100
"""Fewest samples that a profile is made from."""

WIDTH = 128
"""Most dimensions that a layer is sketched to."""

VECTORS = 3000
"""Vectors that thresholds are found with, or more: fewer samples are shared out among folds several times."""

SAMPLES_PER_DIMENSION = 8
MIN_WIDTH = 16
"""A layer is sketched to half as many dimensions, down to this, until there are so many samples for each."""


class ReferenceWarning(UserWarning):
    """A reference profile carries less than is asked of it."""


@dataclass(frozen=True, eq=False)
class ReferenceProfile:
    """What a detector knows of clean data: standards of comparison, and thresholds for any false-alarm rate.

    Made by :meth:`fit`, kept by :meth:`save`. It holds no sample, and a few numbers for each channel.

    Attributes:
        layers: Qualified names of the BatchNorm layers, in execution order.
        fingerprint: Hash of their running statistics and affine parameters.
        samples: Number of samples that it was made from.
        distinct_samples: Number of different ones among them.
        nonfinite_samples: Samples that were left out for NaN or infinity, beside those.
        repeated_samples: Samples that were left out as they had been there before.
        target_arl: The average run length that :attr:`measured_arl` was measured for.
        measured_arl: Average run length on held-out samples, with its 95 % confidence interval.
        sketch: From features to short vectors.
        whitening: From those to vectors with mean 0 and covariance 1.
        levels: What makes the statistics comparable.
        mixtures: How odd samples are where only the shares of the classes have changed.
        thresholds: Evidence of each chart from which on there is an alarm, for each of :data:`calibration.ARLS`.
        scores: Sorted oddness of the samples, each judged by what others gave, which p-values refer to; a few that fill
            no fold are left out.
        ordered: Whether the reference was taken as a sequence, each sample depending on those before it.
        values: Values that were read of each sample at each layer, about; None is all. A monitor reads as many.
    """

    layers: tuple[str, ...]
    fingerprint: str
    samples: int
    distinct_samples: int
    nonfinite_samples: int
    repeated_samples: int
    target_arl: float
    measured_arl: RunLength
    sketch: Sketch
    whitening: Whitening
    levels: Levels
    mixtures: Mixtures
    thresholds: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    ordered: bool = False
    values: int | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        target_arl: float = 10_000,
        ordered: bool = False,
        width: int = WIDTH,
        seed: int = 0,
        values: int | None = VALUES,
        progress: Callable[[str, int], object] = lambda _stage, _samples: None,
    ) -> ReferenceProfile:
        """Make a profile from clean samples like those in production.

        The samples are split: three quarters to fit and to set thresholds, each sample being judged by what the
        others gave, and a quarter to measure. They are taken as independent of each other, unless ``ordered`` says
        that they came as a sequence, such as the frames of a video: then neighbours stay together.

        Args:
            model: The model; it runs in eval mode, without gradients, whatever its flags say.
            loader: Batches: a tensor, a tuple or list whose first item is the input (as labelled data sets
                give), or a mapping of keyword arguments.
            target_arl: Samples between false alarms for which to measure; alarms may be asked for at any other.
            ordered: Whether each sample may depend on the ones before it.
            width: Most dimensions that each layer is sketched to; few samples carry fewer.
            seed: Of the split and the simulations.
            values: Values to read of each sample at each layer, about; None reads all. A monitor reads as many.
            progress: Called with a stage (``"reading"``, ``"calibrating"``, ``"measuring"``) and the number of
                samples read so far.

        Raises:
            ReferenceProfileError: If the data or the model give no profile.
        """
        check_target(target_arl)
        rng = np.random.default_rng(seed)
        collector = Collector(width, rng, ordered=ordered)
        data = collect(model, loader, collector, lambda samples: progress("reading", samples), values)
        profile = cls.of_data(data, target_arl=target_arl, rng=rng, progress=progress)
        profile.warn(target_arl)
        return profile

    @classmethod
    def of_data(
        cls,
        data: ReferenceData,
        *,
        target_arl: float,
        rng: np.random.Generator,
        progress: Callable[[str, int], object] = lambda _stage, _samples: None,
    ) -> ReferenceProfile:
        """Make a profile from what was collected; the arguments are those of :meth:`fit`."""
        _check_enough(data)
        progress("calibrating", data.samples)
        data = data.narrowed(_width(len(data.fitting), data.sketch.width))
        dimensions = data.sketch.dimensions
        whitening = Whitening.fit(data.fitting, dimensions)
        run = dependent_run(whitening.apply(data.fitting)) if data.ordered else 1
        run = min(run, len(data.fitting) // (4 * FOLDS))
        folds = _out_of_fold(data.fitting, dimensions, run, rng)
        found = calibrate(folds, dimensions, rng, run)
        progress("measuring", data.samples)
        measuring = Pool.of(whitening.apply(data.held_out), found.levels, run=run)
        measured_arl = measure(
            measuring,
            len(data.fitting),
            dimensions,
            found.levels,
            thresholds=thresholds_at(found.thresholds, target_arl),
            target_arl=target_arl,
            rng=rng,
        )
        return cls(
            layers=tuple(point.name for point in data.points),
            fingerprint=fingerprint(data.points),
            samples=data.samples,
            distinct_samples=data.distinct_samples,
            nonfinite_samples=data.nonfinite_samples,
            repeated_samples=data.repeated_samples,
            target_arl=float(target_arl),
            measured_arl=measured_arl,
            sketch=data.sketch,
            whitening=whitening,
            levels=found.levels,
            mixtures=Mixtures.fit(np.concatenate(folds), found.levels),
            thresholds=found.thresholds,
            scores=np.sort(np.concatenate([found.oddness, measuring.oddness])).astype(np.float64),
            ordered=data.ordered,
            values=data.values,
        )

    @property
    def supported_arl(self) -> float:
        """The longest average run length that the number of samples carries."""
        return min(float(CARRIED * self.distinct_samples), float(ARLS[-1]))

    def threshold(self, target_arl: float) -> npt.NDArray[np.float64]:
        """Return the evidence, one for each chart, that clean data exceed once in ``target_arl`` samples on average."""
        check_target(target_arl)
        return thresholds_at(self.thresholds, target_arl)

    def cautions(self, target_arl: float) -> list[str]:
        """Say what speaks against using the profile for a target, one sentence each.

        It has too few samples, they were repeated, or the measured run length is far from what it was asked for.
        """
        return cautions(self, target_arl)

    def warn(self, target_arl: float) -> None:
        """Warn of what :meth:`cautions` says, if anything."""
        if found := self.cautions(target_arl):
            warnings.warn("; ".join(found), ReferenceWarning, stacklevel=3)

    def check(self, points: Iterable[ObservationPoint]) -> None:
        """Refuse a model that the profile was not made with.

        Raises:
            ReferenceMismatchError: If the layers of the profile are missing, or have other statistics.
        """
        found = {point.name: point for point in points}
        missing = [name for name in self.layers if name not in found]
        if missing:
            raise ReferenceMismatchError(
                f"the model has no BatchNorm layer {missing[0]!r} (and {len(missing) - 1} others of the reference "
                "profile): the profile was made with another model; make one with this model"
            )
        seen = fingerprint([found[name] for name in self.layers])
        if seen != self.fingerprint:
            raise ReferenceMismatchError(
                f"the model's BatchNorm statistics have fingerprint {seen[:12]}, the reference profile was made with "
                f"{self.fingerprint[:12]}: it belongs to another model or to other weights; make one with this model"
            )

    @cached_property
    def typical_direction(self) -> float:
        """How untypical a shift is that is like clean samples' own differences: 1 where features are independent.

        On the scale of a diagnosis. It is less the more of their differences lie in few directions.
        """
        features = 2 * np.array(self.sketch.channels) / self.sketch.dimensions
        variance = self.whitening.principal_variance(self.sketch.dimensions) / features
        return float(1 / np.sqrt(variance.mean()))

    @cached_property
    def digest(self) -> str:
        """Hash of everything that vectors and alarms depend on: of two profiles of one model, each has its own."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def encode(self, features: Array, out: Array | None = None) -> tuple[Array, Array, Array]:
        """Encode finite features, shape ``(N, F)``.

        Args:
            features: What a :class:`FeatureReader` read.
            out: Where the standardised features go; a new array if None.

        Returns:
            Standardised features ``(N, F)``, whitened vectors ``(N, layers, width)`` and their lengths ``(N, layers)``.
        """
        standardised = self.sketch.standardise(features, out)
        vectors = self.whitening.apply(self.sketch.project(standardised))
        return standardised, vectors, lengths(vectors)

    def p_values(self, oddness: Array) -> npt.NDArray[np.float64]:
        """Return the share of clean samples at least as odd, one p-value a sample (Vovk et al. 2005).

        ``(1 + #{reference scores >= score}) / (reference scores + 1)``: uniform for samples like the reference.

        Args:
            oddness: How odd each sample is, shape ``(N,)``: the largest of :meth:`Levels.oddness` over its layers.
        """
        as_odd = len(self.scores) - np.searchsorted(self.scores, oddness, side="left")
        p: npt.NDArray[np.float64] = (1 + as_odd) / (len(self.scores) + 1)
        return p

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile to a safetensors file, whole or not at all."""
        facts = {
            "layers": list(self.layers),
            "channels": list(self.sketch.channels),
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "distinct_samples": self.distinct_samples,
            "nonfinite_samples": self.nonfinite_samples,
            "repeated_samples": self.repeated_samples,
            "target_arl": self.target_arl,
            "measured_arl": [self.measured_arl.mean, self.measured_arl.low, self.measured_arl.high],
            "ordered": self.ordered,
            "values": self.values,
        }
        write_profile(path, facts, self._arrays())

    def _arrays(self) -> Arrays:
        return {
            "centre": self.sketch.centre,
            "scale": self.sketch.scale,
            "mean": self.whitening.mean,
            "matrix": self.whitening.matrix,
            "median": self.levels.median,
            "high": self.levels.high,
            "odd_centre": self.mixtures.centre,
            "odd_spread": self.mixtures.spread,
            "odd_slopes": self.mixtures.slopes,
            "thresholds": self.thresholds,
            "scores": self.scores,
        }

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ReferenceProfile:
        """Read a profile; no code of the file runs.

        Raises:
            ReferenceProfileError: If the file is missing, damaged or something else.
        """
        facts, arrays = read_profile(path)
        channels = tuple(facts["channels"])
        return cls(
            layers=tuple(facts["layers"]),
            fingerprint=facts["fingerprint"],
            samples=facts["samples"],
            distinct_samples=facts.get("distinct_samples", facts["samples"]),
            nonfinite_samples=facts["nonfinite_samples"],
            repeated_samples=facts.get("repeated_samples", 0),  # nobody looked
            target_arl=facts["target_arl"],
            measured_arl=RunLength(*facts["measured_arl"]),
            sketch=Sketch(channels, arrays["mean"].shape[1], arrays["centre"], arrays["scale"]),
            whitening=Whitening(arrays["mean"], arrays["matrix"]),
            levels=Levels(arrays["median"], arrays["high"]),
            mixtures=Mixtures(arrays["odd_centre"], arrays["odd_spread"], arrays["odd_slopes"]),
            thresholds=arrays["thresholds"],
            scores=arrays["scores"],
            ordered=facts["ordered"],
            values=facts.get("values"),  # a profile that does not tell was made from all
        )


def check_target(target_arl: float) -> None:
    """Refuse a target that no threshold is known for."""
    if not ARLS[0] <= target_arl <= ARLS[-1]:
        raise ValueError(f"target_arl={target_arl}: use {ARLS[0]:.0f} to {ARLS[-1]:.0f} samples between false alarms")


def thresholds_at(thresholds: npt.NDArray[np.float64], target_arl: float) -> npt.NDArray[np.float64]:
    """Interpolate each chart's thresholds between those of :data:`calibration.ARLS`."""
    return np.array([np.interp(math.log(target_arl), np.log(ARLS), row) for row in thresholds])


def _check_enough(data: ReferenceData) -> None:
    """Refuse data that give no profile."""
    taken = data.samples + data.repeated_samples
    if taken < MIN_SAMPLES:
        raise ReferenceProfileError(
            f"the reference has {taken} finite samples: give at least {MIN_SAMPLES}, better 1000 or more"
        )
    if not data.sketch.varies:
        raise ReferenceProfileError(
            f"the reference's {taken} samples do not differ in any layer, so nothing is known of how far "
            "clean ones do: give samples as various as those in production"
        )
    if data.distinct_samples < MIN_SAMPLES:
        raise ReferenceProfileError(
            f"of the reference's {taken} finite samples only {data.distinct_samples} are distinct: give at least "
            f"{MIN_SAMPLES} different ones, better 1000 or more; repeats say nothing new of clean data"
        )


def _width(samples: int, most: int) -> int:
    """Return how many dimensions so many samples carry: a covariance takes several samples for each."""
    width = most
    while width > MIN_WIDTH and width * SAMPLES_PER_DIMENSION > samples and width % 4 == 0:
        width //= 2
    return width


def _out_of_fold(sketches: Array, dimensions: Sequence[int], run: int, rng: np.random.Generator) -> Array:
    """Share samples out among folds and whiten each fold by what the others give, as fresh samples will be.

    Runs of samples stay together. A few samples are shared out several times, each time differently.

    Returns:
        Shape ``(folds, samples, layers, width)``.
    """
    count, vectors = len(sketches), []
    for _ in range(math.ceil(VECTORS / count)):
        starts = rng.permutation(count // run)[: count // run // FOLDS * FOLDS] * run + rng.integers(count % run + 1)
        for fold in (starts[:, None] + np.arange(run)).reshape(FOLDS, -1):
            others = np.delete(sketches, fold, axis=0)
            vectors.append(Whitening.fit(others, dimensions).apply(sketches[fold]))
    return np.stack(vectors)
