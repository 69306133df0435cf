"""Whether each sample's output is the same in batches of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from guardserve.audit.axes import settled
from guardserve.audit.comparison import Difference, Part, sample_of, shapes_of, tolerance, whole, worst_difference
from guardserve.audit.copies import NotCopyableError
from guardserve.audit.examples import Example
from guardserve.audit.recording import first_difference, record
from guardserve.audit.workbench import Workbench, workbench
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
        random: Whether the same batch gives another output each time, so that sizes cannot be compared.
    """

    sample: int
    size: int
    whole: int
    difference: Difference | None
    module: str | None = None
    error: Exception | None = None
    random: bool = False

    def __str__(self) -> str:
        if self.random:
            return f"the same batch gives another output with another seed, in eval mode too: {self.difference}"
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
        model: The model, in any mode; a copy of it is run.
        example: Tensor, tuple of tensors, or dict of tensors by parameter name, with the batch as first axis. Where it
            has fewer rows than the largest size, others are made up from the first one.
        sizes: Batch sizes; the largest is what the others are compared with.
        rtol: Allowed difference, as a part of the sample's largest value; by default what rounding in the model's
            types may explain.

    Returns:
        The worst sample, or None when all agree.

    Raises:
        InputError: The example has no batch axis, or no rows.
        ValueError: There are no two different positive sizes, or the model cannot be copied.
    """
    if len(set(sizes)) < 2 or min(sizes) < 1:  # noqa: PLR2004 - two are needed to compare
        raise ValueError(f"sizes={tuple(sizes)}: give at least two different batch sizes, such as (1, 2, 7)")
    largest = max(sizes)
    given = Example.of(example, model)
    try:
        with workbench(model) as bench:
            bench.initialise(*given.call)
            batch = settled(bench, given).among(largest, 0)
            return _Comparison(bench, batch, rtol).worst(sorted(set(sizes) - {largest}))
    except NotCopyableError as error:
        raise ValueError(f"{type(model).__name__} was not run: {error}, and running it could alter it") from error


class _Comparison:
    """Compares the rows of one batch with what they give in smaller ones."""

    def __init__(self, bench: Workbench, batch: Example, rtol: float | None) -> None:
        self._bench = bench
        self._batch = batch
        self._together = self._run(batch)
        types = {t.dtype for _, t in named_tensors(self._together) if t.is_floating_point() or t.is_complex()}
        self._allowed = tolerance(types, same_size=False) if rtol is None else rtol

    def worst(self, sizes: Sequence[int]) -> Variance | None:
        """Return the worst sample in batches of these sizes, or None when all agree."""
        found: Variance | None = None
        for size in sizes:
            for start in range(0, self._batch.rows - size + 1, size):
                try:
                    variance = self._compare(range(start, start + size))
                except Exception as error:  # noqa: BLE001 - a model may raise anything at a size that it does not take
                    return Variance(start, size, self._batch.rows, None, error=error)
                if variance is not None and (found is None or _part(variance) > _part(found)):
                    found = variance
        if found is None:
            return None
        noise = worst_difference(
            whole(self._together), whole(self._run(self._batch, seed=1)), self._allowed, labels=False
        )
        if noise is not None and noise.is_real:
            return replace(found, difference=noise, random=True)
        start = found.sample - found.sample % found.size
        return replace(found, module=self._begins(range(start, start + found.size), found.sample))

    def _run(self, example: Example, seed: int = 0) -> Any:
        run = self._bench.run(*example.call, seed=seed)
        if run.error is not None:
            raise run.error
        return run.output

    def _compare(self, rows: range) -> Variance | None:
        """Compare what each of some rows gives in a batch of their own with what it gives in the whole one."""
        apart = self._run(self._batch.take(rows))
        worst: Variance | None = None
        for place, sample in enumerate(rows):
            here = list(_sample(apart, place, len(rows)))
            shapes = shapes_of(apart) if len(rows) == 1 else None
            there = sample_of(self._together, sample, self._batch.rows, shapes)
            difference = worst_difference(here, there, self._allowed, labels=False)
            if difference is not None and difference.is_real:
                found = Variance(sample, len(rows), self._batch.rows, difference)
                worst = found if worst is None or _part(found) > _part(worst) else worst
        return worst

    def _begins(self, rows: range, sample: int) -> str | None:
        """Find the innermost module whose output for the sample is the first to differ."""
        place = sample - rows.start
        apart = record(self._bench, self._batch.take(rows), lambda _, y: _sample(y, place, len(rows)))
        together = record(self._bench, self._batch, lambda _, y: _sample(y, sample, self._batch.rows))
        # a difference grows on its way to the output, so a part of what is allowed there counts
        return first_difference(apart, together, self._allowed / 10, labels=False)


def _part(variance: Variance) -> float:
    return variance.difference.part if variance.difference is not None else float("inf")


def _sample(output: Any, place: int, rows: int) -> Iterator[Part]:
    return whole(output) if rows == 1 else sample_of(output, place, rows)
