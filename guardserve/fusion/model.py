"""The fused copy of a model, and the report of what was fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from guardserve.batchnorm import observation_points
from guardserve.fusion.agreement import Call, Example, check_agreement, eval_copy, run
from guardserve.fusion.dataflow import Dataflow, DataflowError, trace_dataflow
from guardserve.fusion.pairs import find_pairs
from guardserve.graphs import graph_norms

M = TypeVar("M", bound=nn.Module)

_IN_GRAPH = "it is part of a TorchScript or exported graph: fuse the model before tracing or exporting it"


@dataclass(frozen=True)
class FusionReport:
    """What fusion made of the BatchNorm layers of a model.

    Attributes:
        fused: Qualified names of the layers that were fused, in registration order.
        skipped: The others, each with the reason.
        unobservable_channels: Fused layers with channels from which a monitor cannot read what entered the layer,
            because their ``weight`` is about 0, with the number of these channels.
    """

    fused: tuple[str, ...]
    skipped: Mapping[str, str]
    unobservable_channels: Mapping[str, int]


def fuse(model: M, example: Example | None = None) -> M:
    """Return a copy of a model, for inference, in which BatchNorm layers are fused into the layers before them.

    A convolution or linear layer and the BatchNorm layer that alone takes its output become one layer, which
    does the arithmetic of both. In the BatchNorm layer's place, under its name, stays a
    :class:`guardserve.batchnorm.FusedBatchNorm`: it computes nothing, and a :class:`guardserve.Monitor` reads
    there what would have entered the layer. What belongs together is read from the data flow; what cannot be
    fused stays as it is, and :func:`fusion_report` says why.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    >>> fused = fuse(model, torch.randn(2, 3, 8, 8))
    >>> fused[1]
    FusedBatchNorm(4, eps=1e-05)
    >>> fusion_report(fused).skipped
    {'3': 'it follows 2 (ReLU), not a convolution or linear layer'}

    The copy answers as the model does when it is called with the arguments that the example has; without an
    example, with the required ones. Where control flow depends on shapes, that is so for shapes which take the
    example's way. Weights, statistics, or attributes that steer the forward must not be changed
    in it later: change the model, and fuse it again.

    Do not fuse while other threads run models: tracing patches ``torch.nn.Module``.

    Args:
        model: The model, in any mode, neither compiled nor monitored. It stays as it is.
        example: Arguments of a forward. With it more models can be traced, and the copy's answer is compared with
            the model's: relative to each output's largest value, half of the digits must agree that the coarsest
            element type has. Outputs that are not floating point are not compared: a class may flip at a tie.

    Returns:
        The copy, in eval mode.

    Raises:
        FusionError: If the model cannot be copied, fails on the example, or its copy answers otherwise.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse needs a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    call = None if example is None else Call.of(example)
    with torch.inference_mode(mode=False), torch.no_grad():
        fused = eval_copy(model)
        pairs, skipped = find_pairs(fused, _dataflow(model, call))
        if call is not None and pairs:
            _, ndims = run(model, call, pairs)
            for name in [name for name, pair in pairs.items() if ndims[name] - {pair.ndim}]:
                skipped[name] = f"{pairs.pop(name).source}, which it follows, has its channels on another axis"
        for pair in pairs.values():
            pair.merge()
        if call is not None and pairs:
            check_agreement(model, fused, call)
    skipped |= {norm.name: _IN_GRAPH for norm in graph_norms(model)}
    points = [point for point in observation_points(fused) if point.name in pairs and point.unobservable_channels]
    report = FusionReport(tuple(pairs), skipped, {point.name: point.unobservable_channels for point in points})
    vars(fused)["_fusion_report"] = report  # an attribute is copied and saved with the model
    return fused


def fusion_report(model: nn.Module) -> FusionReport:
    """Tell what fusion made of the BatchNorm layers of a model.

    Args:
        model: What :func:`fuse` returned, or a copy of it, compiled or not.

    Raises:
        ValueError: If it is another model.
    """
    report = getattr(model, "_fusion_report", None)
    if not isinstance(report, FusionReport):
        raise ValueError(f"this {type(model).__name__} does not come from fuse()")  # noqa: TRY004 - see above
    return report


def check_fused(model: nn.Module, fused: nn.Module, example: Example) -> None:
    """Check on another example that a fused copy answers as the model does.

    Raises:
        FusionError: If it does not, or one of the two fails on the example.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        check_agreement(model, fused, Call.of(example))


def _dataflow(model: nn.Module, call: Call | None) -> Dataflow | DataflowError:
    """Trace a copy, as tracing runs the forward with placeholders, which the model may keep."""
    args, kwargs = (None, None) if call is None else call.copy()
    with torch.random.fork_rng([]):
        try:
            return trace_dataflow(eval_copy(model), args, kwargs)
        except DataflowError as reason:
            return reason
