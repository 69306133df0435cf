"""What a model does when it is run on an example: a handful of forwards, whose outcomes the dynamic rules judge.

The model runs in eval mode as EvalGuard would run it, so that what the probes find is what no guard can mend.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

from guardserve.audit.comparison import Difference, Part, sample_of, shapes_of, tolerance, whole, worst_difference
from guardserve.audit.examples import WILD, Example, middle
from guardserve.audit.fit import Fit, measure_fit
from guardserve.audit.flow import Flow
from guardserve.audit.observer import Observer
from guardserve.audit.workbench import Run, Workbench, workbench
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite, named_tensors
from guardserve.tracing import NonFiniteOrigin, trace_nonfinite

BATCH = 5
"""Rows of the batches in which a sample is put among strangers."""


class NotRunnableError(Exception):
    """A model cannot be probed, for the reason given."""


@dataclass(frozen=True)
class Dependence:
    """A sample whose output is another in another batch.

    Attributes:
        difference: The worst difference in its output.
        alone: Whether the other batch is the sample alone; else it has as many rows, and other mates.
        module: The innermost module whose output differs first; None when that could not be seen.
    """

    difference: Difference
    alone: bool
    module: str | None


@dataclass(frozen=True)
class Probes:
    """What was seen when a model ran.

    Attributes:
        rows: Rows of the batches that were run.
        fixed: Whether the program takes no other number of rows.
        given: The whole example; None when its rows do not suit the program.
        alone: Its first row by itself; None likewise.
        batch: That row among others; None likewise.
        nonfinite: A non-finite output for the example, and where it arose if that was seen.
        alone_nonfinite: A non-finite output for the row by itself that is finite among others.
        training: Modules that were in training mode at some point of a forward.
        unregistered: Layers that trained and are no submodules: the name of the module that called each, and its class.
        changed: Tensors kept on modules that a forward changed.
        carries: Whether the same input gives another output after a forward that changed some.
        dependence: How a sample's output depends on its batch; a string says why that is not known.
        random: That the output is random, so that a sample alone could not be compared; None when it is not.
        fit: How well the running statistics fit the example; a string says why that is not known.
        flow: What comes before each normalisation; None when it was not seen.
    """

    rows: int
    fixed: bool
    given: Run | None
    alone: Run | None
    batch: Run | None
    nonfinite: tuple[NonFinite, NonFiniteOrigin | None] | None
    alone_nonfinite: NonFinite | None
    training: tuple[str, ...]
    unregistered: tuple[tuple[str, str], ...]
    changed: tuple[str, ...]
    carries: bool
    dependence: Dependence | str | None
    random: str | None
    fit: Fit | str
    flow: Flow | None


def run_probes(model: nn.Module, value: Any, norms: frozenset[str]) -> Probes:
    """Run a model on an example.

    Args:
        model: The model, which is not altered.
        value: A tensor, or a tuple or dict of them.
        norms: Names of its normalisation layers.

    Raises:
        InputError: The example is none.
        NotRunnableError: The model does not run on it.
    """
    example = Example.of(value, model)
    if not example.is_finite:
        raise NotRunnableError("the example itself holds NaN or infinity")
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise NotRunnableError("it is on the meta device, without values")
    with workbench(model) as bench:
        try:
            bench.initialise(example.args, example.kwargs)
        except ValueError as error:
            raise NotRunnableError(str(error)) from error
        return _Prober(bench, example, norms).probe()


class _Prober:
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
        self._single = self._example.take([0])
        self._batch = self._example.among(self._rows, 0)
        self._changed: list[str] = []
        self._random: str | None = None
        self._observer: Observer | None = None

    def probe(self) -> Probes:
        alone = self._run(self._single, observed=True)
        given = alone if self._example.rows == 1 else self._run(self._example)
        batch = self._run(self._batch, observed=self._observer is None) if self._rows > 1 else None
        failures = [run.failure for run in (given, alone, batch) if run is not None]
        if all(failures):
            raise NotRunnableError(f"it does not run on the example: {failures[0]}")
        dependence: Dependence | str | None
        try:
            dependence = self._dependence(alone, batch)
        except NotRunnableError as reason:
            dependence = str(reason)
        fit: Fit | str = f"the program takes only {self._fixed} rows"
        if self._fixed is None or self._fixed == self._example.rows:
            fit = measure_fit(self._bench, self._example)
        alone_nonfinite = self._alone_nonfinite(alone, batch)
        nonfinite = None if alone_nonfinite and (given is alone) else self._nonfinite(given, alone)
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
            bool(self._changed) and self._carries(self._batch if batch and not batch.error else self._single),
            dependence,
            self._random,
            fit,
            self._observer.flow if self._observer else None,
        )

    def _run(self, example: Example, *, observed: bool = False, seed: int = 0) -> Run | None:
        if self._fixed not in {None, example.rows}:
            return None
        observer = Observer(self._bench.model, self._norms) if observed and not self._opaque else None
        within = observer.watching(example.args, example.kwargs) if observer else None
        run = self._bench.run(example.args, example.kwargs, seed=seed, within=within)
        if run.error is None:
            self._observer = observer or self._observer
        self._changed += run.changed
        return run

    def _carries(self, example: Example) -> bool:
        first, second = self._bench.run_twice(example.args, example.kwargs)
        rounding = tolerance(self._dtypes(first.output), same_size=True)
        difference = worst_difference(whole(first.output), whole(second.output), rounding, labels=True)
        return difference is not None and difference.is_real

    def _dependence(self, alone: Run | None, batch: Run | None) -> Dependence | None:
        """Compare what the model returns for one row in several batches.

        Raises:
            NotRunnableError: It cannot be compared.
        """
        if batch is None:
            raise NotRunnableError("the program takes a single row, which has no mates")
        if batch.error:
            raise NotRunnableError(f"it does not run on {self._rows} rows: {batch.failure}")
        sample = list(self._sample(batch, alone))
        if not sample:
            raise NotRunnableError("no output tensor has a batch axis")
        dtypes = self._dtypes(batch.output)
        rounding = tolerance(dtypes, same_size=True)
        for others in (self._example.among(self._rows, WILD), self._example.among(self._rows, 1)):
            run = self._run(others)
            if run is None or run.error:
                continue
            difference = worst_difference(sample, self._sample(run, alone), rounding, labels=True)
            if difference is not None and difference.is_real:
                # the same batch once more: a model with a generator or a memory of its own differs from itself
                again = self._run(self._batch) or batch
                noise = worst_difference(sample, self._sample(again, alone), rounding, labels=True)
                if noise is not None and noise.is_real:
                    self._random = f"the same batch gives another output each time, in eval mode too: {noise}"
                    return None
                return Dependence(difference, alone=False, module=self._locate(others, difference))
            break
        else:
            raise NotRunnableError("it does not run on rows made up to stand beside the example's")
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

    def _sample(self, run: Run, alone: Run | None) -> Iterator[Part]:
        shapes = shapes_of(alone.output) if alone and not alone.error else None
        return sample_of(run.output, middle(self._rows), self._rows, shapes)

    def _locate(self, other: Example, difference: Difference) -> str | None:
        """Find the innermost module whose output for the sample is the first to differ between two batches."""
        single = other.rows == 1
        place = middle(self._rows)
        others = self._record(other, lambda _, y: whole(y) if single else sample_of(y, place, self._rows))
        shapes = [{part.path: part.values.shape for part in parts} if single else None for _, parts in others]
        here = self._record(
            self._batch, lambda i, y: sample_of(y, place, self._rows, shapes[i]) if i < len(shapes) else ()
        )
        allowed = difference.tolerance / 10 if single else difference.tolerance
        for (name, parts), (other_name, other_parts) in zip(here, others, strict=False):
            if name != other_name:
                return None
            found = worst_difference(parts, other_parts, allowed, labels=True)
            if found is not None and found.is_real:
                return None if self._opaque and not name else name
        return None

    def _record(self, example: Example, take: Callable[[int, Any], Iterable[Part]]) -> list[tuple[str, list[Part]]]:
        """Run the model once more, and keep what belongs to the sample of every module's output, as modules finish."""
        records: list[tuple[str, list[Part]]] = []
        names = {module: name for name, module in self._bench.model.named_modules()}
        thread = threading.get_ident()

        def hook(module: nn.Module, args: object, output: object) -> None:
            del args
            if module in names and threading.get_ident() == thread:
                # an operation in place may change the output later
                kept = [part._replace(values=part.values.clone()) for part in take(len(records), output)]
                records.append((names[module], kept))

        # a global hook sees modules of TorchScript too, which take none of their own
        handle = register_module_forward_hook(hook)
        try:
            self._bench.run(example.args, example.kwargs)
        finally:
            handle.remove()
        return records

    def _alone_nonfinite(self, alone: Run | None, batch: Run | None) -> NonFinite | None:
        if alone is None or batch is None or batch.error:
            return None
        among_others = {part.path: part.values for part in self._sample(batch, alone)}
        found = find_nonfinite(alone.output)
        return next((bad for bad in found if bad.path in among_others and is_finite(among_others[bad.path])), None)

    def _nonfinite(self, given: Run | None, alone: Run | None) -> tuple[NonFinite, NonFiniteOrigin | None] | None:
        """Find a non-finite output for the example as it is, or for a row of it where the model takes no more."""
        for run, example in ((given, self._example), (alone, self._single)):
            if run is not None and not run.error:
                bad = next(find_nonfinite(run.output), None)
                origin = trace_nonfinite(self._bench.model, *example.args, **example.kwargs) if bad else None
                return (bad, origin) if bad else None
        return None

    def _dtypes(self, output: Any) -> set[torch.dtype]:
        tensors = itertools.chain((tensor for _, tensor in named_tensors(output)), self._bench.model.parameters())
        return {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}


def _fixed_rows(model: nn.Module) -> int | None:
    """Return the only batch size that an exported program takes, or None when it takes any."""
    if not isinstance(model, fx.GraphModule):
        return None
    values = (node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder")
    shape = next((value.shape for value in values if isinstance(value, torch.Tensor) and value.ndim), None)
    return shape[0] if shape is not None and type(shape[0]) is int else None
