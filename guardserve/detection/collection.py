"""Collecting what a profile is made from: features of clean samples, shortened as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from guardserve.batchnorm import ObservationPoint
from guardserve.detection.encoding import Sketch
from guardserve.detection.repeats import without_repeats
from guardserve.exceptions import ReferenceProfileError
from guardserve.modes import EvalHold
from guardserve.observation.features import Array, FeatureReader, execution_order
from guardserve.observation.reading import VALUES
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

STANDARDISED_BY = 512
"""Different samples that centre and scale of single features come from; the others are sketched as they come."""

HELD_OUT = 0.25
"""Share of the samples that take no part in fitting or thresholds."""


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """What is kept of reference samples: never an input, and no whole feature row.

    Attributes:
        points: The layers, in execution order.
        sketch: How features were shortened.
        fitting: Sketches of the samples to fit with, shape ``(N, layers, width)``.
        held_out: Those of the samples to measure with: random ones, or the last of a sequence.
        nonfinite_samples: Samples that were left out for NaN or infinity.
        repeated_samples: Samples that were left out as they had been there before: see :func:`without_repeats`.
        distinct_samples: Number of different samples among the others.
        ordered: Whether the samples are a sequence, each depending on those before it.
        values: Values that were read of each sample at each layer, about; None is all.
    """

    points: list[ObservationPoint]
    sketch: Sketch
    fitting: Array
    held_out: Array
    nonfinite_samples: int
    repeated_samples: int
    distinct_samples: int
    ordered: bool = False
    values: int | None = None

    @property
    def samples(self) -> int:
        """Number of samples in both parts."""
        return len(self.fitting) + len(self.held_out)

    def narrowed(self, width: int) -> ReferenceData:
        """Return the same data sketched to fewer dimensions, a part of those that they have."""
        if width == self.sketch.width:
            return self
        narrow = replace(self.sketch, width=width)
        parts = [self.sketch.fold(part, narrow) for part in (self.fitting, self.held_out)]
        return replace(self, sketch=narrow, fitting=parts[0], held_out=parts[1])


class Collector:
    """Takes records of forwards, one after the other, and keeps sketches of their samples.

    The first complete record settles which layers there are, and how much is read of them.

    Args:
        width: Dimensions that each layer is sketched to.
        rng: Chooses the samples that are held out, and the sketch's signs.
        ordered: Whether the samples are a sequence.
        limit: Samples after which no more are taken; None for any number.
    """

    def __init__(
        self, width: int, rng: np.random.Generator, *, ordered: bool = False, limit: int | None = None
    ) -> None:
        self.samples = self.nonfinite = 0
        self.points: list[ObservationPoint] = []
        self._width, self._rng, self._ordered, self._limit = width, rng, ordered, limit
        self._reader: FeatureReader | None = None
        self._values: int | None = None
        self._sketch: Sketch | None = None
        self._waiting: list[Array] = []
        self._sketches: list[Array] = []
        self._numbers: dict[int, int] = {}
        """By its key, the number of each different sample in the order in which they came."""
        self._which: list[npt.NDArray[np.int64]] = []
        self._held_out: list[npt.NDArray[np.bool_]] = []

    def take(self, points: Sequence[ObservationPoint], record: Record) -> bool:
        """Take the samples of one forward; tell whether it passed each layer once a sample, as the first did."""
        if self._reader is None:
            order = _alike(record)
            if not order:
                return False
            self.points = [points[index] for index in order]
            self._reader = FeatureReader(self.points, order)
            self._values = record.values
        if record.values != self._values or not self._reader.complete(record):
            return False
        features = self._reader.read([record])
        finite = np.isfinite(features).all(1)
        room = len(features) if self._limit is None else self._limit - self.samples
        kept = features[finite][:room]
        self.nonfinite += len(features) - int(finite.sum())
        unknown = np.arange(self.samples, self.samples + len(kept), dtype=np.uint64)  # taken for unlike any other
        keys = unknown if record.keys is None else record.keys[finite][:room]
        known, numbers = len(self._numbers), self._numbers
        which = np.array([numbers.setdefault(key, len(numbers)) for key in keys.tolist()], np.int64)
        different, rows = np.unique(which, return_index=True)
        self._waiting.append(kept[rows[different >= known]])
        self._which.append(which)
        self._held_out.append(self._rng.random(len(kept)) < HELD_OUT)
        self.samples += len(kept)
        if self._sketch is not None or len(numbers) >= STANDARDISED_BY:
            self._shorten(self._reader.channels)
        return True

    def finish(self) -> ReferenceData:
        """Return what was collected.

        Raises:
            ReferenceProfileError: If there is no finite sample.
        """
        if self._reader is None or self.samples == 0:
            raise ReferenceProfileError(
                f"the reference has no finite sample ({self.nonfinite} have NaN or infinity in a layer)"
            )
        self._shorten(self._reader.channels)
        if self._sketch is None:
            raise ReferenceProfileError(
                f"the reference has {self.samples} finite samples, {len(self._numbers)} of them different: "
                "give at least 100 different ones, better 1000 or more"
            )
        which, held_out = self._parts()
        sketches = np.concatenate(self._sketches)[which]
        return ReferenceData(
            self.points,
            self._sketch,
            sketches[~held_out],
            sketches[held_out],
            self.nonfinite,
            self.samples - len(sketches),
            len(self._numbers),
            self._ordered,
            self._values,
        )

    def _parts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tell which of the different samples each of those to keep is, and which of these to hold out."""
        which = np.concatenate(self._which)
        once = without_repeats(which, ordered=self._ordered)
        which = which[once]
        if self._ordered:  # the last quarter of all samples is none of the first three quarters of the first ones
            return which, np.arange(len(which)) >= (1 - HELD_OUT) * len(which)
        return which, np.concatenate(self._held_out)[once]

    def _shorten(self, channels: tuple[int, ...]) -> None:
        if self._sketch is None:
            which, held_out = self._parts()
            if held_out.all():
                return
            features = np.concatenate(self._waiting)[which[~held_out]]
            self._sketch = Sketch.fit(features, channels, self._width, self._rng)
        self._sketches += [self._sketch.project(self._sketch.standardise(part)) for part in self._waiting]
        self._waiting.clear()


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    collector: Collector,
    progress: Callable[[int], object],
    values: int | None = VALUES,
) -> ReferenceData:
    """Run the model in eval mode over all data, once, reading about so many values of each sample at each layer.

    Raises:
        ReferenceProfileError: If the model has no layer to observe, or there are no data.
    """
    records: list[Record] = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    hold = EvalHold(model)
    hold.acquire()
    taps = Taps(model, records.append, values)
    taps.keyed = True
    try:
        if not taps.points:
            raise ReferenceProfileError("the model has no BatchNorm layer with running statistics to observe")
        for batch in loader:
            records.clear()
            _forward(model, batch, device)
            if len(records) != 1:
                raise ReferenceProfileError("a forward passed no BatchNorm layer: there is nothing to observe")
            if not collector.take(taps.points, records[0]):
                raise ReferenceProfileError(_incomplete(collector))
            progress(collector.samples)
    finally:
        taps.close()
        hold.release()
        hold.close()
    return collector.finish()


def _incomplete(collector: Collector) -> str:
    if not collector.points:
        return "no BatchNorm layer has one row a sample: there is nothing to observe"
    return (
        f"a forward did not pass the same {len(collector.points)} BatchNorm layers as the first, each with one row "
        "a sample: a profile needs a model whose layers always run"
    )


@torch.inference_mode()
def _forward(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    else:
        model((batch[0] if isinstance(batch, (tuple, list)) else batch).to(device))


def _alike(record: Record) -> list[int]:
    """List the layers in execution order, without those whose rows are not the samples, such as crops of them."""
    odd = {reading.index for reading in record.readings if len(reading.total) != record.samples}
    return [index for index in execution_order(record) if index not in odd]
