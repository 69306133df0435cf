"""How well running statistics fit an example batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guardserve.audit.examples import Example
from guardserve.audit.workbench import Workbench
from guardserve.batchnorm import CHANNEL_AXIS, BatchNorm, batchnorm_layers, has_running_stats
from guardserve.nonfinite import named_tensors

LEAST_ROWS = 8
"""Fewer rows say too little about the statistics of a batch."""
MOST_ROWS = 64
"""More would only take time."""


@dataclass(frozen=True)
class Misfit:
    """How far the statistics of a layer's input are from its running statistics.

    Attributes:
        name: Qualified name of the layer.
        shift: Median over the channels of the mean's distance from the running mean, in running standard
            deviations, less two standard errors.
        spread: Median over the channels of ``|log(variance / running variance)|``.
    """

    name: str
    shift: float
    spread: float


@dataclass(frozen=True)
class Fit:
    """How well a model's running statistics fit an example batch.

    Attributes:
        disagreement: Distance of the outputs with batch statistics from those with running statistics, in root
            mean square and in units of how much the outputs differ from row to row; two unrelated outputs have 1.4.
        worst: The layer that fits worst.
        rows: Number of rows.
    """

    disagreement: float
    worst: Misfit
    rows: int


def measure_fit(bench: Workbench, example: Example) -> Fit | str:
    """Run a model once with running statistics and once with those of the batch.

    Returns:
        The fit, or why it could not be measured.
    """
    layers = _layers(bench.model)
    if not layers:
        return "there is no BatchNorm layer whose mode could be switched"
    if example.rows < LEAST_ROWS:
        return f"an example of at least {LEAST_ROWS} rows of real data is needed, this one has {example.rows}"
    example = example.take(range(min(example.rows, MOST_ROWS)))
    misfits: list[Misfit] = []
    own = bench.run(example.args, example.kwargs, within=_watching(layers, misfits))
    switched = _batch_statistics(bench.model, _layers(bench.model))
    batch = bench.run(example.args, example.kwargs, held=False, within=switched)
    if own.error or batch.error:
        return f"running it with batch statistics raised {batch.failure or own.failure}"
    disagreement = _disagreement(own.output, batch.output, example.rows)
    if disagreement is None or not misfits:
        return "no finite output has a row for each row of the example"
    return Fit(disagreement, max(misfits, key=lambda misfit: max(misfit.shift, misfit.spread)), example.rows)


def _layers(model: nn.Module) -> dict[str, BatchNorm]:
    return {name: layer for name, layer in batchnorm_layers(model) if has_running_stats(layer)}


@contextmanager
def _batch_statistics(model: nn.Module, layers: dict[str, BatchNorm]) -> Iterator[None]:
    """Switch BatchNorm layers to training, and everything else, dropout above all, to eval."""
    flags = {module: module.training for module in model.modules()}
    normalising = set(layers.values())
    try:
        for module in flags:
            module.training = module in normalising
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def _watching(layers: dict[str, BatchNorm], misfits: list[Misfit]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            misfit = _misfit(name, layer, args[0]) if args and isinstance(args[0], torch.Tensor) else None
            if misfit is not None:
                misfits.append(misfit)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _misfit(name: str, layer: Any, activations: torch.Tensor) -> Misfit | None:
    values = activations.detach().double()
    by_channel = values.transpose(0, CHANNEL_AXIS).flatten(1)
    # positions in one image are no independent samples, rows are
    by_row = values.flatten(2).mean(2) if values.ndim > CHANNEL_AXIS + 1 else values
    error = by_row.std(0) / math.sqrt(len(by_row))
    mean, variance = layer.running_mean.double(), layer.running_var.double() + layer.eps
    shift = ((by_channel.mean(1) - mean).abs() - 2 * error).clamp_min(0) / variance.sqrt()
    spread = ((by_channel.var(1) + layer.eps) / variance).log().abs()
    misfit = Misfit(name, shift.median().item(), spread.median().item())
    return misfit if math.isfinite(misfit.shift) and math.isfinite(misfit.spread) else None


def _disagreement(own: Any, batch: Any, rows: int) -> float | None:
    others = dict(named_tensors(batch))
    found = []
    for path, tensor in named_tensors(own):
        other = others.get(path)
        if other is None or other.shape != tensor.shape or not tensor.ndim or len(tensor) != rows:
            continue
        if tensor.is_floating_point() and tensor.numel():
            first, second = tensor.double().reshape(rows, -1), other.double().reshape(rows, -1)
            between = (first.var(0, correction=0).mean() + second.var(0, correction=0).mean()) / 2
            found.append(((first - second).square().mean() / between.clamp_min(1e-300)).sqrt().item())
    finite = [value for value in found if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
