"""Running a model over reference data and keeping what a profile is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from guardserve.batchnorm import ObservationPoint
from guardserve.exceptions import ReferenceProfileError
from guardserve.modes import EvalHold
from guardserve.monitor.encoding import Sketch
from guardserve.monitor.features import Array, FeatureReader, execution_order
from guardserve.monitor.taps import Record, Taps

STANDARDISED_BY = 512
"""Samples that centre and scale of single features come from; the others are sketched as they come."""

HELD_OUT = 0.25
"""Share of the samples that take no part in fitting or thresholds."""


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """What is kept of reference samples: never an input, and no whole feature row.

    Attributes:
        points: The layers, in execution order.
        sketch: How features were shortened.
        fitting: Sketches of the samples to fit with, shape ``(N, layers, width)``.
        held_out: Those of the samples to measure with.
        nonfinite_samples: Samples that were left out for NaN or infinity.
    """

    points: list[ObservationPoint]
    sketch: Sketch
    fitting: Array
    held_out: Array
    nonfinite_samples: int

    @property
    def samples(self) -> int:
        """Number of samples in both parts."""
        return len(self.fitting) + len(self.held_out)


def collect(
    model: nn.Module, loader: Iterable[Any], width: int, rng: np.random.Generator, progress: Callable[[int], object]
) -> ReferenceData:
    """Run the model in eval mode over all data, once.

    Raises:
        ReferenceProfileError: If the model has no layer to observe, or there are no data.
    """
    waiting: list[tuple[Array, npt.NDArray[np.bool_]]] = []
    sketches: list[Array] = []
    held_out: list[npt.NDArray[np.bool_]] = []
    sketch: Sketch | None = None
    samples = nonfinite = 0
    points: list[ObservationPoint] = []
    for reader_points, reader, features in _feature_batches(model, loader):
        points = reader_points
        finite = np.isfinite(features).all(1)
        kept = features[finite]
        waiting.append((kept, rng.random(len(kept)) < HELD_OUT))
        held_out.append(waiting[-1][1])
        samples += len(kept)
        nonfinite += len(features) - len(kept)
        progress(samples)
        if sketch is not None or samples >= STANDARDISED_BY:
            sketch = sketch or _fit_sketch(waiting, reader.channels, width, rng)
            sketches += [sketch.project(sketch.standardise(part)) for part, _ in waiting]
            waiting.clear()
    if samples == 0:
        raise ReferenceProfileError(f"the reference has no finite sample ({nonfinite} have NaN or infinity in a layer)")
    if sketch is None:
        sketch = _fit_sketch(waiting, reader.channels, width, rng)
    sketches += [sketch.project(sketch.standardise(part)) for part, _ in waiting]
    everything, chosen = np.concatenate(sketches), np.concatenate(held_out)
    return ReferenceData(points, sketch, everything[~chosen], everything[chosen], nonfinite)


def _fit_sketch(
    waiting: list[tuple[Array, npt.NDArray[np.bool_]]],
    channels: tuple[int, ...],
    width: int,
    rng: np.random.Generator,
) -> Sketch:
    fitting = np.concatenate([features[~chosen] for features, chosen in waiting])
    if not len(fitting):
        raise ReferenceProfileError("the reference has too few finite samples: give at least 100, better 1000 or more")
    return Sketch.fit(fitting, channels, width, rng)


def _feature_batches(
    model: nn.Module, loader: Iterable[Any]
) -> Iterator[tuple[list[ObservationPoint], FeatureReader, Array]]:
    """Yield the features of each batch, with the layers and the reader that the first batch settled."""
    records: list[Record] = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    hold = EvalHold(model)
    hold.acquire()
    taps = Taps(model, records.append)
    try:
        if not taps.points:
            raise ReferenceProfileError("the model has no BatchNorm layer with running statistics to observe")
        reader: FeatureReader | None = None
        for batch in loader:
            records.clear()
            _forward(model, batch, device)
            if len(records) != 1:
                raise ReferenceProfileError("a forward passed no BatchNorm layer: there is nothing to observe")
            if reader is None:
                order = _alike(records[0])
                if not order:
                    raise ReferenceProfileError("no BatchNorm layer has one row a sample: there is nothing to observe")
                points = [taps.points[index] for index in order]
                reader = FeatureReader(points, order)
            if not reader.complete(records[0]):
                raise ReferenceProfileError(
                    f"a forward did not pass the same {len(points)} BatchNorm layers as the first, each with one row "
                    "a sample: a profile needs a model whose layers always run"
                )
            yield points, reader, reader.read(records)
    finally:
        taps.close()
        hold.release()
        hold.close()


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
