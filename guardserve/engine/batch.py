"""Several requests in one forward: joined, run, taken apart again, each with what is its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from guardserve.engine.job import DeviceError, Job, OutOfMemoryError, Result
from guardserve.exceptions import InputError, ModelOutputError
from guardserve.identity import identified
from guardserve.nonfinite import is_finite
from guardserve.runtime import Forward, Runtime

_log = logging.getLogger(__name__)

DEVICE_ERROR = "CUDA error"
"""How the message of an error begins that comes from the device itself; before torch 2.8 it has no class of its own."""


class Batch:
    """Runs batches, so that no request's answer depends on those beside it.

    A request whose inputs are not finite is taken out before the forward. If a joint forward fails, each request is
    run once more by itself, so that only what made it fail fails. Memory that did not suffice is tried once more with
    half the rows.

    Args:
        runtime: The model.
        begin: Called before each forward with its number of rows.
        end: Called after each forward, also when it raised.
        count: Called with the kind of each fault that is met: ``"batch_retry"``, ``"out_of_memory"``,
            ``"device_error"``.
    """

    def __init__(
        self,
        runtime: Runtime,
        begin: Callable[[int], object],
        end: Callable[[], object],
        count: Callable[[str], object],
    ) -> None:
        self._runtime = runtime
        self._begin = begin
        self._end = end
        self._count = count

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Run requests of one shape; return the result of each, whatever the model does."""
        try:
            return self._joint(jobs)
        except BaseException as error:  # noqa: BLE001 - a model may raise anything, and the engine lives on
            if len(jobs) == 1 or isinstance(error, DeviceError):
                return [Result.failed(error)] * len(jobs)
            _log.warning("a batch of %d requests failed and is run one by one: %s", len(jobs), type(error).__name__)
            if isinstance(error, ModelOutputError) and self._runtime.apart is None:
                self._runtime.apart = f"a joint forward gave {error}"
        self._count("batch_retry")
        return [self.run([job])[0] for job in jobs]

    def _joint(self, jobs: Sequence[Job]) -> list[Result]:
        tensors = _joined(jobs)
        if not all(map(is_finite, tensors)):
            return self._without_nonfinite(jobs)
        forward = self._forward(tensors, score=any(job.score for job in jobs))
        if len(jobs) == 1:
            return [self._share(jobs[0], forward)]
        results, start = [], 0
        for job in jobs:
            stop = start + job.rows
            results.append(self._share(job, _part(forward, start, stop)))
            start = stop
        return results

    def _without_nonfinite(self, jobs: Sequence[Job]) -> list[Result]:
        """Refuse the requests whose inputs are not finite, and run the others."""
        refused = {}
        for job in jobs:
            with identified(job.identity):
                found = self._runtime.nonfinite_inputs(job.inputs)
            if found:
                refused[job] = Result.failed(InputError(f"{found[0]}: send finite numbers"))
        rest = [job for job in jobs if job not in refused]
        results = refused | (dict(zip(rest, self.run(rest), strict=True)) if rest else {})
        return [results[job] for job in jobs]

    def _share(self, job: Job, forward: Forward) -> Result:
        """Judge one request's part of a forward."""
        outputs = forward.outputs
        if forward.finite or all(map(is_finite, outputs.values())):
            return Result(outputs, p_values=forward.p_values)
        with identified(job.identity):
            errors = self._runtime.nonfinite_outputs(outputs, job.inputs)
        return Result(outputs, errors, forward.p_values) if job.allow_nonfinite else Result.failed(errors[0])

    def _forward(self, tensors: Sequence[torch.Tensor], *, score: bool) -> Forward:
        rows = tensors[0].shape[0]
        try:
            return self._timed(tensors, score=score)
        except torch.cuda.OutOfMemoryError as error:
            self._count("out_of_memory")
            cause = error
        if rows == 1 or self._runtime.apart is not None:
            raise OutOfMemoryError(f"the device's memory does not suffice for {rows} rows") from cause
        torch.cuda.empty_cache()
        try:
            parts = (slice(rows // 2), slice(rows // 2, None))
            halves = [self._timed([tensor[part] for tensor in tensors], score=score) for part in parts]
        except torch.cuda.OutOfMemoryError as error:
            self._count("out_of_memory")
            raise OutOfMemoryError(f"the device's memory does not suffice for half of {rows} rows") from error
        return _whole(halves)

    def _timed(self, tensors: Sequence[torch.Tensor], *, score: bool) -> Forward:
        self._begin(tensors[0].shape[0])
        try:
            return self._runtime.forward(tensors, score=score)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not str(error).startswith(DEVICE_ERROR):
                raise
            self._count("device_error")
            raise DeviceError(f"the device failed: {str(error).splitlines()[0]}") from error
        finally:
            self._end()


def _joined(jobs: Sequence[Job]) -> Sequence[torch.Tensor]:
    if len(jobs) == 1:
        return jobs[0].inputs
    return [torch.cat(parts) for parts in zip(*[job.inputs for job in jobs], strict=True)]


def _part(forward: Forward, start: int, stop: int) -> Forward:
    outputs = {name: tensor[start:stop] for name, tensor in forward.outputs.items()}
    return Forward(outputs, forward.finite, None if forward.p_values is None else forward.p_values[start:stop])


def _whole(parts: Sequence[Forward]) -> Forward:
    outputs = {name: torch.cat([part.outputs[name] for part in parts]) for name in parts[0].outputs}
    p_values = [part.p_values for part in parts]
    known = None if any(values is None for values in p_values) else [p for values in p_values for p in values or ()]
    return Forward(outputs, all(part.finite for part in parts), known)
