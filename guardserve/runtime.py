"""A loaded model with its guard and its monitor: the one thing that every face uses."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from guardserve.exceptions import GuardserveError, InputError, NonFiniteOutputError
from guardserve.fusion import check_fused, fuse, fusion_report
from guardserve.guard import EvalGuard, HazardPolicy
from guardserve.loading import LoadedModel
from guardserve.monitor import Monitor, ReferenceProfile
from guardserve.nonfinite import find_nonfinite
from guardserve.outputs import named_outputs, output_specs
from guardserve.signature import Signature, TensorSpec
from guardserve.tracing import trace_nonfinite

PROBE_SIZE = 32
"""What the start-up probe puts for a free input size other than the batch."""

TRACE_INTERVAL = 10.0
"""Seconds between two searches for the origin of non-finite outputs: each costs a forward."""

_log = logging.getLogger(__name__)


class ProbeError(GuardserveError):
    """The model failed its first forward."""


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

    Raises:
        TrainingModeError: If eval mode cannot fix the model and ``on_hazard`` is ``"raise"``.
        ReferenceMismatchError: If the reference profile belongs to another model.

    Attributes:
        failure: Why the model is not ready; None when it is.
        signature: Its inputs, and once it has started its outputs.
        static_batch: The only batch size that the model takes, None when it takes any.
        monitor: The monitor on its BatchNorm layers.
        nonfinite: Samples with a non-finite value, by ``("input" | "output", name)``.
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
    ) -> None:
        self.name = loaded.name
        self.platform = loaded.platform
        self.device = loaded.device
        self.signature = Signature(loaded.inputs)
        self.failure: str | None = "the model has not been probed yet"
        self.guard = EvalGuard(loaded.module, on_hazard=on_hazard, inference_mode=True, trace_interval=TRACE_INTERVAL)
        self.monitor = Monitor(
            loaded.module,
            window=shift_window,
            min_samples=shift_min_samples,
            threshold=shift_threshold,
            reference=reference,
            target_arl=target_arl,
        )
        self.nonfinite: Counter[tuple[str, str]] = Counter()
        self._counting = threading.Lock()
        self._held = False

    @property
    def static_batch(self) -> int | None:
        """The only batch size that the model takes; None when it takes any."""
        batch = self.signature.inputs[0].shape[0]
        return None if batch == -1 else batch

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
        except Exception as error:
            self.failure = f"the start-up probe failed: {error}"
            raise ProbeError(self.failure) from error
        self.monitor.reset()
        self.failure = None
        if not self.monitor.layers and not self.monitor.unobserved:
            _log.warning("%s has no BatchNorm layer: there is nothing to monitor", self.name)
        for layer, reason in self.monitor.unobserved.items():
            _log.warning("BatchNorm layer %s is not monitored: %s", layer, reason)

    def close(self) -> None:
        """Let go of the model: remove every hook and give every module its own flag back."""
        self.failure = "the model has been closed"
        self.monitor.close()
        try:
            if self._held:
                self._held = False
                self.guard.release()
        finally:
            self.guard.close()

    def infer(
        self, inputs: Mapping[str, torch.Tensor], forward_time: Callable[[float], object] = lambda _: None
    ) -> dict[str, torch.Tensor]:
        """Run the model once.

        Args:
            inputs: One tensor for each input of the signature, batch first, on any device.
            forward_time: Called with the seconds that the forward took, also when it raised.

        Returns:
            The outputs by name, on the CPU.

        Raises:
            InputError: If an input holds NaN or infinity.
            NonFiniteOutputError: If an output does.
            ModelOutputError: If an output cannot be served, as when it has not one row for each sample.
            TrainingModeError: If the forward moved running statistics; see :class:`guardserve.EvalGuard`.
        """
        for name, tensor in inputs.items():
            for bad in find_nonfinite(tensor, f"input {name!r}"):
                self._count_nonfinite("input", name, len(bad.rows))
                raise InputError(f"{bad}: send finite numbers")
        started = time.perf_counter()
        try:
            return self._forward(inputs)
        except NonFiniteOutputError as error:
            _log.warning("%s: %s", self.name, error)
            raise
        finally:
            forward_time(time.perf_counter() - started)

    def _forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = [inputs[spec.name].to(self.device) for spec in self.signature.inputs]
        outputs = named_outputs(self.guard.run(*tensors), len(tensors[0]))
        errors: list[NonFiniteOutputError] = []
        for name, tensor in outputs.items():
            try:
                self.guard.check(tensor, name, lambda: trace_nonfinite(self.guard.module, *tensors))
            except NonFiniteOutputError as error:  # noqa: PERF203 - each output is counted
                self._count_nonfinite("output", name, len(error.rows))
                errors.append(error)
        if errors:
            raise errors[0]
        return {name: tensor.to("cpu") for name, tensor in outputs.items()}

    def _count_nonfinite(self, origin: str, name: str, rows: int) -> None:
        with self._counting:
            self.nonfinite[origin, name] += rows

    def _probe(self) -> tuple[TensorSpec, ...]:
        """Run the model at batch size 1, then with every free size doubled to see which output sizes follow."""
        small, large = (
            self._forward({spec.name: spec.example(batch, size) for spec in self.signature.inputs})
            for batch, size in ((1, PROBE_SIZE), (2, 2 * PROBE_SIZE))
        )
        return output_specs(small, large)


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
