"""What a model does when it is run on an example: a handful of forwards, whose outcomes the dynamic rules judge.

The model runs in eval mode as EvalGuard would run it, so that what the probes find is what no guard can mend.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from guardserve.audit.axes import settled
from guardserve.audit.comparison import (
    Difference,
    Part,
    sample_of,
    shapes_of,
    shared_of,
    tolerance,
    whole,
    worst_difference,
)
from guardserve.audit.copies import NotCopyableError
from guardserve.audit.examples import WILD, Example, middle
from guardserve.audit.fit import Fit, measure_fit
from guardserve.audit.masks import by_design, infinite_places
from guardserve.audit.observer import Observer
from guardserve.audit.probes import BadOutput, Dependence, NotRunnableError, Probes
from guardserve.audit.recording import first_difference, record
from guardserve.audit.workbench import Run, Workbench, workbench
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite, named_tensors
from guardserve.tracing import trace_nonfinite

BATCH = 5
"""Rows of the batches in which a sample is put among strangers."""


def run_probes(model: nn.Module, value: Any, norms: frozenset[str]) -> Probes:
    """Run a model on an example.

    Args:
        model: The model, which is not altered.
        value: A tensor, or a tuple or dict of them.
        norms: Names of its normalisation layers.

    Raises:
        InputError: The example is none.
        NotRunnableError: The model does not run on it, or cannot be copied.
    """
    example = Example.of(value, model)
    if not example.is_finite:
        raise NotRunnableError("the example itself holds NaN or infinity")
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise NotRunnableError("it is on the meta device, without values")
    try:
        with workbench(model) as bench:
            bench.initialise(*example.call)
            return Prober(bench, example, norms).probe()
    except NotCopyableError as error:
        raise NotRunnableError(f"{error}, and running the model itself could alter it") from error
    except ValueError as error:
        raise NotRunnableError(str(error)) from error


class Prober:
    """Runs the forwards, one after the other."""

    def __init__(self, bench: Workbench, example: Example, norms: frozenset[str]) -> None:
        fixed = _fixed_rows(bench.model)
        self._bench = bench
        self._norms = norms
        self._fixed = fixed
        self._rows = fixed or BATCH
        # what a graph does cannot be seen from outside, and it has no modes to change
        self._opaque = isinstance(bench.model, (torch.jit.ScriptModule, fx.GraphModule))
        self._example = example.take(range(fixed)) if fixed and fixed < example.rows else example
        if not fixed:
            self._example = settled(bench, self._example)
        self._types = _types(bench.model.parameters())
        self._chosen = self._example.shortest_first()
        self._single = self._chosen.take([0])
        self._batch = self._chosen.among(self._rows, 0)
        self._changed: list[str] = []
        self._random: str | None = None
        self._unsteady: str | None = None
        self._reduced: Difference | None = None
        self._uncompared: list[str] = []
        self._observer: Observer | None = None

    def probe(self) -> Probes:
        """Run the model a handful of times.

        Raises:
            NotRunnableError: It raises on the whole example, on its first row, and among made-up rows.
        """
        alone = self._run(self._single, observed=True)
        given = alone if self._example.rows == 1 else self._run(self._example)
        others, other = self._other_mates() if self._rows > 1 else (None, None)
        batch = carried = None
        if self._rows > 1:
            batch = self._run(self._batch, observed=self._observer is None, keep=True)
            carried = self._carried(others, other, alone)
        elif alone is not None and not alone.error:
            self._run(self._single, keep=True)
            carried = self._carried(self._single, alone, None)
        self._bench.rewind()
        runs = [run for run in (given, alone, batch) if run is not None]
        if all(run.error for run in runs):
            raise NotRunnableError(f"it does not run on the example: {runs[0].failure}")
        dependence: Dependence | str | None
        try:
            dependence = self._dependence(alone, batch, others, other)
        except NotRunnableError as reason:
            dependence = str(reason)
        fit: Fit | str = f"the program takes only {self._fixed} rows"
        if self._fixed is None or self._fixed == self._example.rows:
            fit = measure_fit(self._bench, self._example)
        alone_nonfinite = self._alone_nonfinite(alone, batch)
        nonfinite = None
        if not (alone_nonfinite and given is alone):
            nonfinite = self._nonfinite(given, alone, other)
        unread = [f"{what}, which is not looked at" for run in runs for what in run.unread]
        return Probes(
            self._rows,
            self._fixed is not None,
            given,
            alone,
            batch,
            nonfinite,
            alone_nonfinite,
            tuple(self._observer.training) if self._observer else (),
            tuple(self._observer.unregistered) if self._observer else (),
            tuple(dict.fromkeys(self._changed)),
            carried,
            self._unsteady,
            dependence,
            self._reduced,
            tuple(dict.fromkeys([*unread, *self._uncompared])),
            self._random,
            fit,
            self._observer.flow if self._observer else None,
        )

    def _run(self, example: Example, *, observed: bool = False, keep: bool = False, seed: int = 0) -> Run | None:
        if self._fixed not in {None, example.rows}:
            return None
        observer = Observer(self._bench.model, self._norms) if observed and not self._opaque else None
        within = observer.watching(example.args, example.kwargs) if observer else None
        run = self._bench.run(*example.call, seed=seed, keep=keep, within=within)
        if run.error is None:
            self._observer = observer or self._observer
        self._changed += run.changed
        return run

    def _other_mates(self) -> tuple[Example | None, Run | None]:
        """Put the row among rows made up to stand beside it; none when the model runs on no such."""
        for others in (self._chosen.among(self._rows, WILD), self._chosen.among(self._rows, 1)):
            run = self._run(others)
            if run is not None and not run.error:
                return others, run
        return None, None

    def _carried(self, example: Example | None, fresh: Run | None, alone: Run | None) -> str | None:
        """Compare answers that come after other requests with those of a fresh model."""
        for inputs, first in ((example, fresh), (self._single, alone)):
            if inputs is None or first is None or first.error:
                continue
            later = self._run(inputs, keep=True)
            rounding = tolerance(self._dtypes(first.output), same_size=True)
            changes = _changes(first, later, rounding)
            if changes is not None:
                self._bench.rewind()
                # a model with randomness or a state outside it differs from itself
                self._unsteady = _changes(first, self._run(inputs), rounding)
                return None if self._unsteady else changes
        return None

    def _dependence(
        self, alone: Run | None, batch: Run | None, others: Example | None, other: Run | None
    ) -> Dependence | None:
        """Compare what the model returns for one row in several batches.

        Raises:
            NotRunnableError: It cannot be compared.
        """
        if batch is None:
            raise NotRunnableError("the program takes a single row, which has no mates")
        if batch.error:
            raise NotRunnableError(f"it does not run on {self._rows} rows: {batch.failure}")
        if others is None or other is None:
            raise NotRunnableError("it does not run on rows made up to stand beside the example's")
        dtypes = self._dtypes(batch.output)
        rounding = tolerance(dtypes, same_size=True)
        sample = list(self._sample(batch, alone))
        difference = worst_difference(sample, self._sample(other, alone), rounding, labels=True)
        shared = worst_difference(self._shared(batch, alone), self._shared(other, alone), rounding, labels=True)
        if _is_real(difference) or _is_real(shared):
            # the same batch once more: a model with a generator or a memory of its own differs from itself
            again = self._run(self._batch) or batch
            noise = worst_difference(whole(batch.output), whole(again.output), rounding, labels=True)
            if noise is not None and noise.is_real:
                self._unsteady = str(noise)
                self._random = f"the same batch gives another output each time, in eval mode too: {noise}"
                return None
        self._leave_out(batch, other, alone, shared)
        if not sample:
            raise NotRunnableError("no output tensor has a batch axis")
        if difference is not None and difference.is_real:
            return Dependence(difference, alone=False, module=self._locate(others, difference))
        return self._dependence_on_size(alone, sample, tolerance(dtypes, same_size=False))

    def _dependence_on_size(self, alone: Run | None, sample: list[Part], rounding: float) -> Dependence | None:
        if alone is None or alone.error:
            return None
        difference = worst_difference(sample, whole(alone.output), rounding, labels=False)
        if difference is None or not difference.is_real:
            return None
        again = self._run(self._single, seed=1)
        noise = worst_difference(whole(alone.output), whole(again and again.output), rounding, labels=False)
        if noise is not None and noise.is_real:
            self._random = f"alone a row's output is random, in eval mode too: {noise}"
            return None
        return Dependence(difference, alone=True, module=self._locate(self._single, difference))

    def _leave_out(self, batch: Run, other: Run, alone: Run | None, shared: Difference | None) -> None:
        """Note what belongs to no row: a value for the whole batch, or rows that cannot be told apart."""
        if shared is not None and shared.is_real:
            self._reduced = shared
        shapes = {part.path: part.values.shape for part in self._shared(other, alone)}
        for part in self._shared(batch, alone):
            if shapes.get(part.path) != part.values.shape:
                shape = tuple(part.values.shape)
                self._uncompared.append(f"the rows of {part.path}, of shape {shape}, cannot be told apart")

    def _sample(self, run: Run, alone: Run | None) -> Iterator[Part]:
        return sample_of(run.output, middle(self._rows), self._rows, _shapes(alone))

    def _shared(self, run: Run, alone: Run | None) -> Iterator[Part]:
        return shared_of(run.output, self._rows, _shapes(alone))

    def _locate(self, other: Example, difference: Difference) -> str | None:
        """Find the innermost module whose output for the sample is the first to differ between two batches."""
        single = other.rows == 1
        place = middle(self._rows)
        there = record(self._bench, other, lambda _, y: whole(y) if single else sample_of(y, place, self._rows))
        shapes = [{part.path: part.values.shape for part in parts} if single else None for _, parts in there]
        here = record(
            self._bench,
            self._batch,
            lambda i, y: sample_of(y, place, self._rows, shapes[i]) if i < len(shapes) else (),
        )
        name = first_difference(here, there, difference.tolerance / (10 if single else 1), labels=True)
        return None if self._opaque and not name else name

    def _alone_nonfinite(self, alone: Run | None, batch: Run | None) -> NonFinite | None:
        if alone is None or batch is None or batch.error:
            return None
        among_others = {part.path: part.values for part in self._sample(batch, alone)}
        found = find_nonfinite(alone.output)
        return next((bad for bad in found if bad.path in among_others and is_finite(among_others[bad.path])), None)

    def _nonfinite(self, given: Run | None, alone: Run | None, other: Run | None) -> BadOutput | None:
        """Find a non-finite output for the example as it is, or for a row of it where the model takes no more."""
        for run, example in ((given, self._example), (alone, self._single)):
            if run is not None and not run.error:
                bad = next(find_nonfinite(run.output), None)
                if bad is None:
                    return None
                origin = trace_nonfinite(self._bench.model, *example.args, **example.kwargs)
                self._bench.discard()
                places = infinite_places(run.output, bad.path), infinite_places(other and other.output, bad.path)
                return BadOutput(bad, origin, by_design(origin, *places))
        return None

    def _dtypes(self, output: Any) -> set[torch.dtype]:
        return self._types | _types(tensor for _, tensor in named_tensors(output))


def _types(tensors: Iterable[torch.Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}


def _is_real(difference: Difference | None) -> bool:
    return difference is not None and difference.is_real


def _shapes(alone: Run | None) -> dict[str, torch.Size] | None:
    return shapes_of(alone.output) if alone and not alone.error else None


def _changes(first: Run, later: Run | None, rounding: float) -> str | None:
    """Say how a later answer to the same request differs; None when it does not."""
    if later is None:
        return None
    if later.error:
        return f"a request fails that a fresh model answers: {later.failure}"
    if shapes_of(first.output) != shapes_of(later.output):
        return "a request gets an answer of another shape than from a fresh model"
    difference = worst_difference(whole(first.output), whole(later.output), rounding, labels=True)
    return f"a request gets another answer than from a fresh model: {difference}" if _is_real(difference) else None


def _fixed_rows(model: nn.Module) -> int | None:
    """Return the only batch size that an exported program takes, or None when it takes any."""
    if not isinstance(model, fx.GraphModule):
        return None
    values = (node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder")
    shape = next((value.shape for value in values if isinstance(value, torch.Tensor) and value.ndim), None)
    return shape[0] if shape is not None and type(shape[0]) is int else None
