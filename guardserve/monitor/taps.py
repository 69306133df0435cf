"""Forward hooks that read what enters each BatchNorm layer, and little else.

The hot path is here: a few tensor operations a layer, no synchronisation, no judging.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from guardserve.batchnorm import CHANNEL_AXIS, ObservationPoint, batchnorm_layers, observation_points
from guardserve.graphs import graph_norms
from guardserve.nonfinite import named_tensors
from guardserve.tracing import is_tracing


@dataclass
class Record:
    """What one forward showed.

    Attributes:
        samples: Number of samples, as the model's own input has them; None when a part was called by itself.
        readings: For each layer, every time it ran, its index and the mean and variance of its input, both of
            shape ``(N, C)``: over the positions of one sample in one channel, in the layer's own units.
    """

    samples: int | None = None
    readings: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)


def sample_moments(x: torch.Tensor, samples: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each sample's mean and population variance over its positions, channel by channel.

    Args:
        x: Input of a BatchNorm layer, shape ``(rows, C, *positions)``, any floating dtype and memory format.
        samples: Number of samples N, when it is known. If the model has laid k rows out of each (frames, crops),
            one sample after the other, they count as its positions.

    Returns:
        Mean and variance, each of shape ``(N, C)``, at least float32.
    """
    rows = len(x)
    if samples and rows > samples and rows % samples == 0:
        x = x.reshape(samples, rows // samples, *x.shape[1:]).transpose(1, 2)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.ndim == CHANNEL_AXIS + 1:
        return x.detach().clone(), torch.zeros_like(x)
    positions = x.detach().flatten(CHANNEL_AXIS + 1)
    mean = positions.mean(-1, keepdim=True)
    return mean.squeeze(-1), (positions - mean).square_().mean(-1)


class Hook:
    """A forward hook that a copy or a pickle of the model leaves behind: there it does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        """Run the hook."""
        if self._function is not None:
            self._function(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Taps:
    """The hooks of one monitor on one model.

    Attributes:
        points: The observation points, in registration order; a reading refers to one by index.
        unobserved: Qualified names of BatchNorm layers that cannot be watched, each with the reason.
    """

    def __init__(self, model: nn.Module, emit: Callable[[Record], None]) -> None:
        self.points: list[ObservationPoint] = []
        self.unobserved: dict[str, str] = {}
        self._emit = emit
        self._open = threading.local()
        self._handles: list[Any] = []
        try:
            self._attach(model)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, model: nn.Module) -> None:
        self.points.extend(observation_points(model))
        for index, point in enumerate(self.points):
            self._handles.append(point.layer.register_forward_pre_hook(Hook(self._tap(index)), with_kwargs=True))
        observed = {point.name for point in self.points}
        for name, _ in batchnorm_layers(model):
            if name not in observed:
                self.unobserved[name] = "it keeps no running statistics (track_running_stats=False)"
        for norm in graph_norms(model):
            self.unobserved[norm.name] = "a traced or exported graph takes no hooks"
        if self.points:
            self._handles.append(model.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
            self._handles.append(model.register_forward_hook(Hook(self._end), always_call=True))

    def _tap(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        point = self.points[index]

        def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del layer
            if is_tracing():
                return
            x = args[0] if args else next(iter(kwargs.values()))
            if not point.takes(x):
                self.unobserved.setdefault(point.name, "its input has not the shape that its statistics are for")
                return
            if not len(x):
                return
            record: Record | None = getattr(self._open, "record", None)
            reading = (index, *sample_moments(x, None if record is None else record.samples))
            if record is not None:
                record.readings.append(reading)
            else:  # a part of the model was called by itself
                self._emit(Record(None, [reading]))

        return read

    def _begin(self, model: nn.Module, args: object, kwargs: object) -> None:
        del model
        first = next((tensor for _, tensor in named_tensors((args, kwargs)) if tensor.ndim), None)
        self._open.record = None if is_tracing() else Record(None if first is None else len(first))

    def _end(self, model: nn.Module, args: object, output: object) -> None:
        """Hand over the record; a forward that raised (its output is None) has seen no sample through."""
        del model, args
        record: Record | None = getattr(self._open, "record", None)
        self._open.record = None
        if record is not None and record.readings and output is not None:
            self._emit(record)
