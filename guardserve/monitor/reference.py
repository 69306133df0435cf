"""Reference profiles: what clean data look like to a model, and how often a detector is wrong about it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from guardserve.batchnorm import ObservationPoint
from guardserve.exceptions import ReferenceMismatchError, ReferenceProfileError
from guardserve.monitor.calibration import ARLS, Levels, RunLength, find_levels, find_thresholds, measure
from guardserve.monitor.collection import collect
from guardserve.monitor.encoding import Sketch, Whitening, shorten
from guardserve.monitor.features import Array, fingerprint
from guardserve.monitor.profile_file import Arrays, read_profile, write_profile

MIN_SAMPLES = 100
"""Fewest samples that a profile is made from."""

CARRIED = 10
"""A profile of N samples carries a target of this many times N samples between false alarms."""

FOLDS = 4

RADIUS_QUANTILE = 0.999


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
        nonfinite_samples: Samples that were left out for NaN or infinity, beside those.
        target_arl: The average run length that :attr:`measured_arl` was measured for.
        measured_arl: Average run length on held-out samples, with its 95 % confidence interval.
        sketch: From features to short vectors.
        whitening: From those to vectors with mean 0 and covariance 1.
        radius: Length that a layer's vector is cut to, so that no single sample alarms by itself.
        levels: What makes the statistics comparable.
        thresholds: Evidence from which on there is an alarm, for each of :data:`calibration.ARLS`.
        scores: Sorted scores of all samples, each judged by what others gave, which p-values refer to.
    """

    layers: tuple[str, ...]
    fingerprint: str
    samples: int
    nonfinite_samples: int
    target_arl: float
    measured_arl: RunLength
    sketch: Sketch
    whitening: Whitening
    radius: Array
    levels: Levels
    thresholds: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        target_arl: float = 10_000,
        width: int = 32,
        seed: int = 0,
        progress: Callable[[str, int], object] = lambda _stage, _samples: None,
    ) -> ReferenceProfile:
        """Make a profile from clean samples, independent of each other and like those in production.

        The samples are split at random: three quarters to fit and to set thresholds, each sample being judged
        by what the others gave, and a quarter to measure.

        Args:
            model: The model; it runs in eval mode, without gradients, whatever its flags say.
            loader: Batches: a tensor, a tuple or list whose first item is the input (as labelled data sets
                give), or a mapping of keyword arguments.
            target_arl: Samples between false alarms for which to measure; alarms may be asked for at any other.
            width: Dimensions that each layer is sketched to.
            seed: Of the split and the simulations.
            progress: Called with a stage (``"reading"``, ``"calibrating"``, ``"measuring"``) and the number of
                samples read so far.

        Raises:
            ReferenceProfileError: If the data or the model give no profile.
        """
        check_target(target_arl)
        rng = np.random.default_rng(seed)
        data = collect(model, loader, width, rng, lambda samples: progress("reading", samples))
        if data.samples < MIN_SAMPLES:
            raise ReferenceProfileError(
                f"the reference has {data.samples} finite samples: give at least {MIN_SAMPLES}, better 1000 or more"
            )
        progress("calibrating", data.samples)
        dimensions = data.sketch.dimensions
        folds = _out_of_fold(data.fitting, dimensions, rng)
        length = np.sqrt(np.square(np.concatenate(folds)).sum(-1))
        radius = np.maximum(np.quantile(length, RADIUS_QUANTILE, axis=0), np.finfo(np.float32).tiny).astype(np.float32)
        pools = [shorten(fold, radius) for fold in folds]
        levels = find_levels(pools, dimensions, rng)
        thresholds = find_thresholds(pools, dimensions, levels, rng)
        progress("measuring", data.samples)
        whitening = Whitening.fit(data.fitting, dimensions)
        held_out = whitening.apply(data.held_out)
        measured_arl = measure(
            shorten(held_out, radius),
            dimensions,
            levels,
            threshold=threshold_at(thresholds, target_arl),
            target_arl=target_arl,
            rng=rng,
        )
        profile = cls(
            layers=tuple(point.name for point in data.points),
            fingerprint=fingerprint(data.points),
            samples=data.samples,
            nonfinite_samples=data.nonfinite_samples,
            target_arl=float(target_arl),
            measured_arl=measured_arl,
            sketch=data.sketch,
            whitening=whitening,
            radius=radius,
            levels=levels,
            thresholds=thresholds,
            scores=np.sort(sample_scores(np.concatenate([*folds, held_out]), radius)),
        )
        profile.warn_if_too_small(target_arl)
        return profile

    @property
    def supported_arl(self) -> float:
        """The longest average run length that the number of samples carries."""
        return min(float(CARRIED * self.samples), float(ARLS[-1]))

    def threshold(self, target_arl: float) -> float:
        """Return the evidence that clean data exceed once in ``target_arl`` samples on average."""
        check_target(target_arl)
        return threshold_at(self.thresholds, target_arl)

    def warn_if_too_small(self, target_arl: float) -> None:
        """Warn when the profile cannot carry a target."""
        if target_arl > self.supported_arl:
            warnings.warn(
                f"target_arl={target_arl:g} is more than a reference of {self.samples} samples carries "
                f"({self.supported_arl:g}): give at least {math.ceil(target_arl / CARRIED)} samples",
                ReferenceWarning,
                stacklevel=3,
            )

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

    def encode(self, features: Array) -> tuple[Array, Array]:
        """Return standardised features ``(N, F)`` and whitened vectors ``(N, layers, width)`` of finite features."""
        standardised = self.sketch.standardise(features)
        return standardised, self.whitening.apply(self.sketch.project(standardised))

    def p_values(self, vectors: Array) -> npt.NDArray[np.float64]:
        """Return the share of clean samples at least as odd, one p-value a sample (Vovk et al. 2005).

        ``(1 + #{reference scores >= score}) / (reference samples + 1)``: uniform for samples like the reference.
        """
        as_odd = len(self.scores) - np.searchsorted(self.scores, sample_scores(vectors, self.radius), side="left")
        p: npt.NDArray[np.float64] = (1 + as_odd) / (len(self.scores) + 1)
        return p

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile to a safetensors file, whole or not at all."""
        facts = {
            "layers": list(self.layers),
            "channels": list(self.sketch.channels),
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "nonfinite_samples": self.nonfinite_samples,
            "target_arl": self.target_arl,
            "measured_arl": [self.measured_arl.mean, self.measured_arl.low, self.measured_arl.high],
        }
        arrays: Arrays = {
            "centre": self.sketch.centre,
            "scale": self.sketch.scale,
            "mean": self.whitening.mean,
            "matrix": self.whitening.matrix,
            "radius": self.radius,
            "median": self.levels.median,
            "high": self.levels.high,
            "thresholds": self.thresholds,
            "scores": self.scores,
        }
        write_profile(path, facts, arrays)

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
            nonfinite_samples=facts["nonfinite_samples"],
            target_arl=facts["target_arl"],
            measured_arl=RunLength(*facts["measured_arl"]),
            sketch=Sketch(channels, arrays["mean"].shape[1], arrays["centre"], arrays["scale"]),
            whitening=Whitening(arrays["mean"], arrays["matrix"]),
            radius=arrays["radius"],
            levels=Levels(arrays["median"], arrays["high"]),
            thresholds=arrays["thresholds"],
            scores=arrays["scores"],
        )


def check_target(target_arl: float) -> None:
    """Refuse a target that no threshold is known for."""
    if not ARLS[0] <= target_arl <= ARLS[-1]:
        raise ValueError(f"target_arl={target_arl}: use {ARLS[0]:.0f} to {ARLS[-1]:.0f} samples between false alarms")


def threshold_at(thresholds: npt.NDArray[np.float64], target_arl: float) -> float:
    """Interpolate between the thresholds of :data:`calibration.ARLS`."""
    return float(np.interp(math.log(target_arl), np.log(ARLS), thresholds))


def sample_scores(vectors: Array, radius: Array) -> npt.NDArray[np.float64]:
    """Return how odd each sample is: its longest vector, relative to the longest ones of the reference."""
    scores: npt.NDArray[np.float64] = (np.sqrt(np.square(vectors).sum(-1)) / radius).max(1).astype(np.float64)
    return scores


def _out_of_fold(sketches: Array, dimensions: Sequence[int], rng: np.random.Generator) -> list[Array]:
    """Share samples out among folds and whiten each fold by what the others give, as fresh samples will be."""
    fold = rng.permutation(len(sketches)) % FOLDS
    return [Whitening.fit(sketches[fold != k], dimensions).apply(sketches[fold == k]) for k in range(FOLDS)]
