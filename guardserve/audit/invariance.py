"""Whether each sample's output is the same in batches of any size."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from guardserve.audit.comparison import Difference, Part, sample_of, shapes_of, tolerance, whole, worst_difference
from guardserve.audit.examples import Example
from guardserve.modes import EvalHold
from guardserve.nonfinite import named_tensors


@dataclass(frozen=True)
class Variance:
    """A sample whose output is another in a batch of another size.

    Attributes:
        sample: Its index in the whole batch.
        size: The batch size in which its output differs most from that in the whole batch.
        whole: Size of the whole batch.
        difference: The worst difference in its output, with the tolerance; None when the model failed at this size.
        module: Qualified name of the innermost module whose output differs first, ``''`` for the model itself; None
            when none was seen.
        error: What the model raised at this size, if it did.
    """

    sample: int
    size: int
    whole: int
    difference: Difference | None
    module: str | None = None
    error: Exception | None = None

    def __str__(self) -> str:
        if self.difference is None:
            return f"it fails at batch size {self.size}: {type(self.error).__name__}: {self.error}"
        text = f"in a batch of {self.size} instead of {self.whole}, sample {self.sample}: {self.difference}"
        if self.module is not None:
            text += f"; it begins in {self.module or 'the model itself'}"
        return text


def batch_variance(
    model: nn.Module, example: Any, sizes: Sequence[int] = (1, 2, 7), rtol: float | None = None
) -> Variance | None:
    """Run the same samples in batches of several sizes, in eval mode, and compare each sample's output.

    Args:
        model: The model, in any mode; every module gets its own flag back.
        example: Tensor, tuple of tensors, or dict of tensors by parameter name, with the batch as first axis. Where it
            has fewer rows than the largest size, others are made up from the first one.
        sizes: Batch sizes; the largest is what the others are compared with.
        rtol: Allowed difference, as a part of the sample's largest value; by default what rounding in the model's
            types may explain.

    Returns:
        The worst sample, or None when all agree.

    Raises:
        InputError: The example has no batch axis, or no rows.
        ValueError: There are no two different positive sizes.
    """
    if len(set(sizes)) < 2 or min(sizes) < 1:  # noqa: PLR2004 - two are needed to compare
        raise ValueError(f"sizes={tuple(sizes)}: give at least two different batch sizes, such as (1, 2, 7)")
    largest = max(sizes)
    batch = Example.of(example, model).among(largest, 0)
    hold = EvalHold(model)
    hold.acquire()
    try:
        with torch.no_grad():
            return _worst(model, batch, sorted(set(sizes) - {largest}), rtol)
    finally:
        hold.release()
        hold.close()


def _worst(model: nn.Module, batch: Example, sizes: Sequence[int], rtol: float | None) -> Variance | None:
    together = model(*batch.args, **batch.kwargs)
    types = {t.dtype for _, t in named_tensors(together) if t.is_floating_point() or t.is_complex()}
    allowed = tolerance(types, same_size=False) if rtol is None else rtol
    worst: Variance | None = None
    for size in sizes:
        for start in range(0, batch.rows - size + 1, size):
            try:
                found = _compare(model, batch, together, range(start, start + size), allowed)
            except Exception as error:  # noqa: BLE001 - a model may raise anything at a size that it does not take
                return Variance(start, size, batch.rows, None, error=error)
            if found is not None and (worst is None or _part(found) > _part(worst)):
                worst = found
    if worst is None:
        return None
    start = worst.sample - worst.sample % worst.size
    module = _begins(model, batch, range(start, start + worst.size), worst.sample, allowed)
    return Variance(worst.sample, worst.size, worst.whole, worst.difference, module)


def _part(variance: Variance) -> float:
    return variance.difference.part if variance.difference is not None else float("inf")


def _compare(model: nn.Module, batch: Example, together: Any, rows: range, allowed: float) -> Variance | None:
    """Compare what each of some rows gives in a batch of their own with what it gives in the whole one."""
    part = batch.take(rows)
    apart = model(*part.args, **part.kwargs)
    worst: Variance | None = None
    for place, sample in enumerate(rows):
        here = list(_sample(apart, place, len(rows)))
        shapes = shapes_of(apart) if len(rows) == 1 else None
        there = sample_of(together, sample, batch.rows, shapes)
        difference = worst_difference(here, there, allowed, labels=False)
        if difference is not None and difference.is_real:
            found = Variance(sample, len(rows), batch.rows, difference)
            worst = found if worst is None or _part(found) > _part(worst) else worst
    return worst


def _sample(output: Any, place: int, rows: int) -> Iterator[Part]:
    return whole(output) if rows == 1 else sample_of(output, place, rows)


def _begins(model: nn.Module, batch: Example, rows: range, sample: int, allowed: float) -> str | None:
    """Find the innermost module whose output for the sample is the first to differ."""
    apart = _outputs(model, batch.take(rows), sample - rows.start)
    together = _outputs(model, batch, sample)
    for (name, here), (other, there) in itertools.zip_longest(apart, together, fillvalue=("", [])):
        if name != other:
            return None
        # a difference grows on its way to the output, so a part of what is allowed there counts
        found = worst_difference(here, there, allowed / 10, labels=False)
        if found is not None and found.is_real:
            return name
    return None


def _outputs(model: nn.Module, batch: Example, place: int) -> list[tuple[str, list[Part]]]:
    """Run the model, and keep what belongs to one sample of every module's output, as modules finish."""
    names = {module: name for name, module in model.named_modules()}
    thread = threading.get_ident()
    kept: list[tuple[str, list[Part]]] = []

    def hook(module: nn.Module, args: object, output: object) -> None:
        del args
        if threading.get_ident() == thread and module in names:
            parts = [part._replace(values=part.values.clone()) for part in _sample(output, place, batch.rows)]
            kept.append((names[module], parts))

    handle = register_module_forward_hook(hook)
    try:
        model(*batch.args, **batch.kwargs)
    finally:
        handle.remove()
    return kept
