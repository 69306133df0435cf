"""A loaded model with its guard and its monitor: the one thing that every face uses."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from guardserve.audit.report import Finding
from guardserve.exceptions import GuardserveError, InputError, NonFiniteOutputError, SettingsError
from guardserve.fingerprints import fingerprint
from guardserve.fusion import check_fused, fuse, fusion_report
from guardserve.guard import EvalGuard, HazardPolicy
from guardserve.identity import Exemplar, current
from guardserve.loading import LoadedModel
from guardserve.monitor import VALUES, Monitor, ReferenceProfile, StateKeeper
from guardserve.nonfinite import NonFinite, find_nonfinite, is_finite
from guardserve.outputs import named_outputs, output_specs
from guardserve.signature import Signature, TensorSpec
from guardserve.tracing import trace_nonfinite, unmonitored

PROBE_SIZE = 32
"""What the start-up probe puts for a free input size other than the batch."""

TRACE_INTERVAL = 10.0
"""Seconds between two searches for the origin of non-finite outputs: each costs a forward."""

WORST_CHANNELS = 16
"""Channels of each layer that a verdict names."""

UNPROBED = "the model has not been probed yet"
"""Why a model is not ready before its start-up probe has ended."""

_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


class ProbeError(GuardserveError):
    """The model failed its first forward."""


class Forward(NamedTuple):
    """What one forward gave.

    Attributes:
        outputs: The outputs by name, each with a row for each sample, on the CPU.
        finite: Whether none of them holds NaN or infinity.
        p_values: How odd the monitor finds each sample, in the order of the rows; None when it cannot tell.
    """

    outputs: dict[str, torch.Tensor]
    finite: bool
    p_values: Sequence[float] | None = None


class Runtime:
    """Runs one model behind its safeguards, from any number of threads.

    It is not ready until :meth:`start` has passed a forward at batch size 1 through it. From then until
    :meth:`close` the model is held in eval mode.

    Args:
        loaded: The model, in any mode.
        on_hazard: See :class:`guardserve.EvalGuard`.
        shift_window: See :class:`guardserve.monitor.Monitor`, as for the next two.
        shift_min_samples: Samples before the window is judged.
        shift_threshold: Score from which on the window counts as shifted.
        reference: Reference profile of the model, if samples are to be judged by one.
        target_arl: With it, samples between false alarms, on average.
        learn: Without a reference, samples served first that one is made of; see :meth:`Monitor.learn`.
        learned: File to save that to.
        state: File that the detector's memory is loaded from, if it is there, and saved to every minute.
        resume: Whether it is loaded; otherwise what the file holds is of no use, and is replaced.
        monitor_values: Values that the monitor reads of each sample at each layer, about; None is all.
        monitor_budget: Share of a forward's time that the monitor may take.
        compile_for: Compile the model, for batches of up to so many rows; None to run it as it is.
        findings: What the audit found in the model.

    Raises:
        TrainingModeError: If eval mode cannot fix the model and ``on_hazard`` is ``"raise"``.
        ReferenceMismatchError: If the reference profile belongs to another model.
        DetectorStateError: If the state is damaged, or of a detector with another profile.
        SettingsError: If the model cannot be compiled here.

    Attributes:
        fingerprint: What tells its weights and structure from others: see :func:`guardserve.fingerprints.fingerprint`.
        findings: What the audit found in it.
        failure: Why the model is not ready; None when it is.
        failing: Whether that is a fault met since it started, which may pass: see :meth:`fail`.
        signature: Its inputs, and once it has started its outputs.
        preprocessing: How images become its only input, if that is declared.
        static_batch: The only batch size that the model takes, None when it takes any.
        apart: Why samples of different requests must not share a forward; None when they may.
        monitor: The monitor on its BatchNorm layers.
        keeper: What saves its state; None without a file for it.
        target_arl: Samples between false alarms, on average, with a reference.
        nonfinite: Samples with a non-finite value, by ``("input" | "output", name)``.
        nonfinite_exemplars: The last request with any, by the same.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        on_hazard: HazardPolicy = "raise",
        shift_window: int = 256,
        shift_min_samples: int = 64,
        shift_threshold: float = 0.5,
        reference: ReferenceProfile | None = None,
        target_arl: float = 10_000,
        learn: int | None = None,
        learned: Path | None = None,
        state: Path | None = None,
        resume: bool = True,
        monitor_values: int | None = VALUES,
        monitor_budget: float | None = None,
        compile_for: int | None = None,
        findings: Sequence[Finding] = (),
    ) -> None:
        self.name = loaded.name
        self.fingerprint = fingerprint(loaded.module)
        self.findings = findings
        self.platform = loaded.platform
        self.device = loaded.device
        self.signature = Signature(loaded.inputs)
        self.preprocessing = loaded.preprocessing
        self.failure: str | None = UNPROBED
        self.failing = False
        self.apart: str | None = None
        module = loaded.module if compile_for is None else _compiled(loaded)
        self._compile_for = compile_for
        self.guard = EvalGuard(module, on_hazard=on_hazard, inference_mode=True, trace_interval=TRACE_INTERVAL)
        self.monitor = Monitor(
            loaded.module,
            window=shift_window,
            min_samples=shift_min_samples,
            threshold=shift_threshold,
            worst_channels=WORST_CHANNELS,
            reference=reference,
            target_arl=target_arl,
            values=monitor_values,
            budget=monitor_budget,
        )
        self.target_arl = target_arl
        self.keeper = None if state is None else StateKeeper(self.monitor, state)
        self._state = state if resume else None
        self._learn, self._learned = learn if reference is None else None, learned
        self._resume()
        self.nonfinite: Counter[tuple[str, str]] = Counter()
        self.nonfinite_exemplars: dict[tuple[str, str], Exemplar] = {}
        self._counting = threading.Lock()
        self._held = False
        self._known_good: dict[str, torch.Tensor] | None = None

    @property
    def static_batch(self) -> int | None:
        """The only batch size that the model takes; None when it takes any."""
        batch = self.signature.inputs[0].shape[0]
        return None if batch == -1 else batch

    @property
    def scores(self) -> bool:
        """Whether the monitor can say how odd a single sample is."""
        return self.monitor.reference is not None

    def start(self) -> None:
        """Hold the model in eval mode and pass a forward at batch size 1 through it.

        Raises:
            ProbeError: If the forward raises, or its outputs are non-finite or cannot be served.
        """
        try:
            if not self._held:
                self.guard.acquire()
                self._held = True
            self.signature = Signature(self.signature.inputs, self._probe())
            self._warm_up()
            self._known_good = self._reproducible()
        except Exception as error:
            self.failure = f"the start-up probe failed: {error}"
            raise ProbeError(self.failure) from error
        self.apart = self._dependence()
        if self.apart is not None:
            _log.warning("requests to %s are not batched: %s", self.name, self.apart)
        self._begin_monitoring()
        self.failure = None
        if not self.monitor.layers and not self.monitor.unobserved:
            _log.warning("%s has no BatchNorm layer: there is nothing to monitor", self.name)
        for layer, reason in self.monitor.unobserved.items():
            _log.warning("BatchNorm layer %s is not monitored: %s", layer, reason)

    def close(self, *, save: bool = True) -> None:
        """Let go of the model: remove every hook and give every module its own flag back.

        Args:
            save: Whether the detector's memory is saved a last time; another may have it in its place by now.
        """
        self.failure, self.failing = "the model has been closed", False
        self.monitor.close()
        if self.keeper is not None:
            self.keeper.close(save=save)
        try:
            if self._held:
                self._held = False
                self.guard.release()
        finally:
            self.guard.close()

    def infer(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model once and insist on finite values.

        Args:
            inputs: One tensor for each input of the signature, batch first, on any device.

        Returns:
            The outputs by name, on the CPU.

        Raises:
            InputError: If an input holds NaN or infinity.
            NonFiniteOutputError: If an output does.
            ModelOutputError: If an output cannot be served, as when it has not one row for each sample.
            TrainingModeError: If the forward moved running statistics; see :class:`guardserve.EvalGuard`.
        """
        tensors = [inputs[spec.name] for spec in self.signature.inputs]
        if not all(map(is_finite, tensors)):
            raise InputError(f"{self.nonfinite_inputs(tensors)[0]}: send finite numbers")
        result = self.forward(tensors)
        if not result.finite:
            raise self.nonfinite_outputs(result.outputs, tensors)[0]
        return result.outputs

    def forward(self, tensors: Sequence[torch.Tensor], *, score: bool = False) -> Forward:
        """Run the model once, whatever values come and go.

        Args:
            tensors: One for each input of the signature, in its order, batch first, on any device.
            score: Whether the monitor is to say at once how odd it finds each sample; it needs a reference profile.

        Raises:
            ModelOutputError: If an output cannot be served, as when it has not one row for each sample.
            TrainingModeError: If the forward moved running statistics; see :class:`guardserve.EvalGuard`.
        """
        rows = tensors[0].shape[0]
        p_values: list[float] | None = None
        if score:
            with self.monitor.scoring() as scores:
                output = self.guard.run(*self._placed(tensors))
            p_values = scores if len(scores) == rows else None  # a forward that did not pass each layer is not judged
        else:
            output = self.guard.run(*self._placed(tensors))
        outputs = named_outputs(output, rows)
        finite = all(map(is_finite, outputs.values()))
        # copies: the model may keep what it returned, and write to it in its next forward
        return Forward({name: tensor.to(_CPU, copy=True) for name, tensor in outputs.items()}, finite, p_values)

    def nonfinite_inputs(self, tensors: Sequence[torch.Tensor]) -> list[NonFinite]:
        """Find and count the inputs of one request that hold NaN or infinity."""
        found = []
        for spec, tensor in zip(self.signature.inputs, tensors, strict=True):
            for bad in find_nonfinite(tensor, f"input {spec.name!r}"):
                self._count_nonfinite("input", spec.name, len(bad.rows))
                found.append(bad)
        return found

    def nonfinite_outputs(
        self, outputs: Mapping[str, torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> list[NonFiniteOutputError]:
        """Find and count the outputs of one request that hold NaN or infinity, and look where that arose.

        Args:
            outputs: The request's rows of each output.
            tensors: The request's inputs, with which the model is run once more to find the first bad module.

        Returns:
            An error for each such output.
        """
        errors: list[NonFiniteOutputError] = []
        for name, tensor in outputs.items():
            try:
                self.guard.check(tensor, name, lambda: trace_nonfinite(self.guard.module, *self._placed(tensors)))
            except NonFiniteOutputError as error:  # noqa: PERF203 - each output is counted
                self._count_nonfinite("output", name, len(error.rows))
                _log.warning("%s: %s", self.name, error, extra={"model": self.name})
                errors.append(error)
        return errors

    def fail(self, reason: str) -> None:
        """Make the model unready for a fault that may outlast the request that met it."""
        if self.failure is None or self.failing:
            self.failure, self.failing = reason, True

    def recover(self) -> None:
        """Make a model that has failed ready again."""
        if self.failing:
            self.failure, self.failing = None, False

    def self_test(self) -> None:
        """Pass an example through the model, unseen by the monitor, and compare what it gives with what it gave.

        Raises:
            ProbeError: If the forward raises, an output is non-finite, cannot be served, or is not what it was when
                the model started, beyond rounding.
        """
        try:
            with unmonitored():
                outputs = self._probe_forward(1, PROBE_SIZE)
        except Exception as error:
            raise ProbeError(f"the self-test failed: {error}") from error
        for name, expected in (self._known_good or {}).items():
            if name not in outputs or not _close(outputs[name], expected):
                raise ProbeError(
                    f"the self-test failed: {name} of a known example is not what it was when the model started, so "
                    "its weights or the device have changed: load the model again"
                )

    def _reproducible(self) -> dict[str, torch.Tensor] | None:
        """Return what the example of the self-test gives; None where it does not give the same twice."""
        with unmonitored():
            first, second = (self._probe_forward(1, PROBE_SIZE) for _ in range(2))
        if first.keys() == second.keys() and all(_close(second[name], tensor) for name, tensor in first.items()):
            return first
        _log.warning("%s answers the same input differently: self-tests look for finite outputs only", self.name)
        return None

    def _warm_up(self) -> None:
        """Show the compiler the batch sizes that it makes code of its own for: one, and more, up to the most."""
        if self._compile_for is not None and self.static_batch is None:
            for batch in dict.fromkeys((1, 2, max(2, self._compile_for))):
                self._probe_forward(batch, PROBE_SIZE)

    def _begin_monitoring(self) -> None:
        """Forget what the probe showed, and begin where the last detector ended, or to learn."""
        self.monitor.reset()
        self._resume()
        if self._learn is not None:
            self.monitor.learn(self._learn, self.target_arl, self._keep_reference)
            self._learn = None
        if self.keeper is not None:
            self.keeper.start()

    def _resume(self) -> None:
        if self._state is not None and self.monitor.reference is not None:
            self.monitor.load_state(self._state)

    def _keep_reference(self, reference: ReferenceProfile) -> None:
        """Save a profile that was made of what was served."""
        arl = reference.measured_arl
        _log.info("%s: a reference profile was made of the first %d samples", self.name, reference.samples)
        _log.info("its measured run length is %.0f samples (%.0f to %.0f)", arl.mean, arl.low, arl.high)
        if self._learned is None:
            return
        try:
            reference.save(self._learned)
        except OSError as error:
            _log.error("the reference profile could not be saved to %s: %s", self._learned, error)

    def _placed(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor if tensor.device == self.device else tensor.to(self.device) for tensor in tensors]

    def _count_nonfinite(self, origin: str, name: str, rows: int) -> None:
        with self._counting:
            self.nonfinite[origin, name] += rows
            identity = current()
            if identity is not None:
                self.nonfinite_exemplars[origin, name] = Exemplar(identity, rows, time.time())

    def _probe(self) -> tuple[TensorSpec, ...]:
        """Run the model at batch size 1, then with every free size doubled to see which output sizes follow."""
        small, large = (self._probe_forward(batch, size) for batch, size in ((1, PROBE_SIZE), (2, 2 * PROBE_SIZE)))
        return output_specs(small, large)

    def _probe_forward(self, batch: int, size: int) -> dict[str, torch.Tensor]:
        tensors = [spec.example(batch, size) for spec in self.signature.inputs]
        result = self.forward(tensors)
        if not result.finite:
            raise self.nonfinite_outputs(result.outputs, tensors)[0]
        return result.outputs

    def _dependence(self) -> str | None:
        """Say why a sample's answer would depend on what it is batched with."""
        if self.static_batch is not None:
            return f"the model takes batches of {self.static_batch} only"
        pair = [spec.example(2, PROBE_SIZE, varied=True) for spec in self.signature.inputs]
        try:
            with unmonitored():
                together = self.forward(pair).outputs
                alone = [self.forward([tensor[row : row + 1] for tensor in pair]).outputs for row in range(2)]
        except Exception as error:  # noqa: BLE001 - a model may raise anything at a size that it was not probed with
            return f"it could not be compared at batch sizes 1 and 2: {error}"
        for name, tensor in together.items():
            if not all(_close(alone[row][name], tensor[row : row + 1]) for row in range(2)):
                return f"a sample's {name} depends on its batch mates: see guardserve audit, rule BN102"
        return None


def _compiled(loaded: LoadedModel) -> nn.Module:
    """Return a model to be compiled in its first forwards, as one graph.

    Raises:
        SettingsError: If it cannot be, or there is no C++ compiler.
    """
    if isinstance(loaded.module, torch.jit.ScriptModule):
        raise SettingsError(f"--compile: {loaded.name} is a TorchScript archive, which torch.compile does not take")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"--compile needs a C++ compiler, and there is no {compiler}: install it, or set CXX to one"
        )
    compiled: Any = torch.compile(loaded.module, fullgraph=True)
    module: nn.Module = compiled
    return module


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two outputs differ by no more than rounding in another order of summation explains."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    part = 1e-3 if b.dtype.itemsize > torch.half.itemsize else 5e-2
    a, b = a.double(), b.double()
    scale = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    return torch.allclose(a, b, rtol=0, atol=part * scale, equal_nan=True)


def fuse_loaded(loaded: LoadedModel) -> LoadedModel:
    """Fuse a loaded model, check the fused copy on examples of its inputs, and log what was fused and what was not.

    Raises:
        FusionError: See :func:`guardserve.fuse`.
    """
    pair, single = ([spec.example(size).to(loaded.device) for spec in loaded.inputs] for size in (2, 1))
    module = fuse(loaded.module, pair)
    report = fusion_report(module)
    if report.fused:
        check_fused(loaded.module, module, single)
    total = len(report.fused) + len(report.skipped)
    _log.info("%s: %d of %d BatchNorm layers are fused", loaded.name, len(report.fused), total)
    for reason in dict.fromkeys(report.skipped.values()):
        layers = [layer for layer, why in report.skipped.items() if why == reason]
        _log.warning("not fused: %s, because %s", ", ".join(layers), reason)
    for layer, channels in report.unobservable_channels.items():
        _log.warning("fused layer %s: %d channels are not monitored, as their weight is about 0", layer, channels)
    return replace(loaded, module=module)
