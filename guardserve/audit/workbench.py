"""Running a model without leaving a trace on it: on a fresh copy each time."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from guardserve.audit.copies import check_independence, copied
from guardserve.audit.state import StateChange
from guardserve.audit.values import read_output
from guardserve.modes import EvalHold


@dataclass(frozen=True)
class Run:
    """One forward of a model.

    Attributes:
        output: What it returned, as far as it could be read, in dicts, lists and tensors.
        error: What it raised.
        changed: Names of the parameters, buffers and other attributes of modules that differ from the model's.
        unread: What could not be read of the output.
    """

    output: Any = None
    error: Exception | None = None
    changed: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """The error in one short line; empty when there was none."""
        if self.error is None:
            return ""
        line = str(self.error).strip().partition("\n")[0]
        return f"{type(self.error).__name__}: {line:.200}"


class Workbench:
    """A copy of a model that runs in eval mode, as EvalGuard would run it, and from the same state each time.

    Where a run has left the copy as it was for certain, the next one uses it again.

    Args:
        model: The model, which is not run itself.

    Raises:
        NotCopyableError: The model cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._source = model
        self._copy: nn.Module | None = copied(model)
        check_independence(model, self._copy)
        self._spent = False

    @property
    def model(self) -> nn.Module:
        """The copy that the next run uses."""
        if self._copy is None:
            self._copy = copied(self._source)
        return self._copy

    def rewind(self) -> None:
        """Let the next run start from the model's own state, whatever the last one has left."""
        if self._spent:
            self.discard()

    def discard(self) -> None:
        """Take a fresh copy the next time."""
        self._copy = None

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        seed: int = 0,
        held: bool = True,
        keep: bool = False,
        within: AbstractContextManager[object] | None = None,
    ) -> Run:
        """Run the model, seeded; whatever it raises is in the result.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            seed: Seed of all random generators.
            held: Whether to hold the model in eval mode; else its own flags count.
            keep: Whether the next run goes on from the state that this one leaves.
            within: Surrounds the forward alone, after the mode is set.
        """
        model, output, failure = self.model, None, None
        unread: tuple[str, ...] = ()
        _seed(model, seed)
        try:
            with self.eval_mode() if held else nullcontext(), torch.no_grad(), within or nullcontext():
                output, unread = read_output(model(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - how a model fails is what a probe wants to know
            failure = error
        change = StateChange(self._source, model)
        self._spent = bool(change.names) or not change.certain
        if not keep:
            self.rewind()
        return Run(output, failure, change.names, unread)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Hold the present copy in eval mode."""
        hold = EvalHold(self.model)
        hold.acquire()
        try:
            yield
        finally:
            hold.release()
            hold.close()

    def initialise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give lazy modules their first input, and start all runs from the state that they have then.

        Raises:
            ValueError: The first forward failed.
        """
        if not any(map(is_lazy, _tensors(self._source))):
            return
        try:
            with self.eval_mode(), torch.no_grad():
                self.model(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"its first forward raised {Run(error=error).failure}") from error
        self._source = self.model
        self.discard()


@contextmanager
def workbench(model: nn.Module) -> Iterator[Workbench]:
    """Put a copy of a model on a bench.

    While the bench is open, random generators are its own, warnings are not shown, and nothing is compiled.

    Raises:
        NotCopyableError: The model cannot be copied.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_random_state(model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield Workbench(model)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


@contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    """Give every random generator its state back at the end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model may use the global one
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _seed(model: nn.Module, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    # torch.manual_seed would reach generators of devices whose state is not kept
    torch.default_generator.manual_seed(seed)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(seed)
    for module in model.modules():
        for value in list(vars(module).values()):
            _seed_own(value, seed)


def _seed_own(generator: object, seed: int) -> None:
    """Seed a generator that a module keeps for itself: that it goes on is no memory of a request."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, (random.Random, np.random.RandomState)):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({tensor.device.index for tensor in _tensors(model) if tensor.is_cuda})
