"""Running a model without leaving a trace on it."""

from __future__ import annotations

import copy
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

from guardserve.modes import EvalHold


@dataclass(frozen=True)
class Run:
    """One forward of a model.

    Attributes:
        output: What it returned.
        error: What it raised.
        changed: Names of the parameters, buffers and other tensors kept on modules whose values it changed.
    """

    output: Any = None
    error: Exception | None = None
    changed: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """The error in one short line; empty when there was none."""
        if self.error is None:
            return ""
        line = str(self.error).strip().partition("\n")[0]
        return f"{type(self.error).__name__}: {line:.200}"


class Workbench:
    """A model that runs in eval mode, as EvalGuard would run it, and from the same state each time.

    Args:
        model: The model.
        is_copy: Whether it is a copy, which may be altered.

    Attributes:
        model: The model.
        is_copy: As given.
    """

    def __init__(self, model: nn.Module, *, is_copy: bool) -> None:
        self.model = model
        self.is_copy = is_copy
        self._hold = EvalHold(model)
        self._state = _State(model)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        seed: int = 0,
        held: bool = True,
        within: AbstractContextManager[object] | None = None,
    ) -> Run:
        """Run the model, seeded; whatever it raises is in the result.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            seed: Seed of all random generators.
            held: Whether to hold the model in eval mode; else its own flags count.
            within: Surrounds the forward alone, after the mode is set.
        """
        output, error = self._forward(args, kwargs, seed=seed, held=held, within=within)
        return Run(output, error, tuple(self._state.restore()))

    def run_twice(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, Run]:
        """Run the model on the same inputs twice, the second time from the state that the first has left."""
        runs = [Run(*self._forward(args, kwargs)) for _ in range(2)]
        self._state.restore()
        return runs[0], runs[1]

    def _forward(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        seed: int = 0,
        held: bool = True,
        within: AbstractContextManager[object] | None = None,
    ) -> tuple[Any, Exception | None]:
        _seed(self.model, seed)
        try:
            with self.eval_mode() if held else nullcontext(), torch.no_grad(), within or nullcontext():
                return self.model(*args, **kwargs), None
        except Exception as error:  # noqa: BLE001 - how a model fails is what a probe wants to know
            return None, error

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Hold the model in eval mode."""
        self._hold.acquire()
        try:
            yield
        finally:
            self._hold.release()

    def initialise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give lazy modules their first input, and take the state that they have then for the first.

        Raises:
            ValueError: The model could not be copied, and must not be altered.
        """
        if not any(map(is_lazy, _tensors(self.model))):
            return
        if not self.is_copy:
            raise ValueError("it has lazy modules and cannot be copied: run one forward first")
        try:
            with self.eval_mode(), torch.no_grad():
                self.model(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"its first forward raised {Run(error=error).failure}") from error
        self._state = _State(self.model)

    def close(self) -> None:
        """Give the model back as it was."""
        self._state.restore()
        self._hold.close()


@contextmanager
def workbench(model: nn.Module) -> Iterator[Workbench]:
    """Put a copy of a model on a bench, or, where it cannot be copied, itself, given back as it was.

    Of a model that cannot be copied, tensors and containers that its modules hold directly are put back.

    While the bench is open, random generators are its own, warnings are not shown, and nothing is compiled.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_random_state(model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        copied = _copied(model)
        bench = Workbench(model if copied is None else copied, is_copy=copied is not None)
        stack.callback(bench.close)
        yield bench


def _copied(model: nn.Module) -> nn.Module | None:
    """Copy a model; None when it cannot be, or when the copy shares tensors with it."""
    try:
        copied: object = copy.deepcopy(model)
    except Exception:  # noqa: BLE001 - a class may refuse in any way
        return None
    if not isinstance(copied, nn.Module):
        return None
    shares = not set(map(id, _tensors(model))).isdisjoint(map(id, _tensors(copied)))
    return None if shares else copied


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


class _State:
    """What a forward may change in a model: parameters, buffers, attributes, and flags of modules that it removes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes = {
            module: {name: (value, _contents(value)) for name, value in vars(module).items()}
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        kept = self._kept()
        self._values = {name: (tensor, tensor.detach().clone()) for name, tensor in kept.items() if _readable(tensor)}

    def restore(self) -> list[str]:
        """Put everything back, and name the tensors that had changed."""
        now = self._kept()
        changed = [name for name, (tensor, value) in self._values.items() if _differ(now.get(name, tensor), value)]
        # the flags of modules in the tree belong to whoever holds the model in a mode
        inside = set(self._model.modules())
        for module, attributes in self._attributes.items():
            flag = {"training"} if module in inside else set()
            for name in vars(module).keys() - attributes.keys() - flag:
                del vars(module)[name]
            for name, (value, contents) in attributes.items():
                if name not in flag:
                    _refill(value, contents)
                    vars(module)[name] = value
        with torch.no_grad():
            for tensor, value in self._values.values():
                if _differ(tensor, value):
                    tensor.copy_(value)
        return changed

    def _kept(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers, and the tensors that modules keep as plain attributes, by name."""
        kept = dict(
            itertools.chain[tuple[str, torch.Tensor]](self._model.named_parameters(), self._model.named_buffers())
        )
        for prefix, module in self._model.named_modules():
            plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
            kept |= {f"{prefix}.{name}" if prefix else name: value for name, value in plain.items()}
        return kept


def _readable(tensor: torch.Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_meta) and tensor.layout is torch.strided


def _differ(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Tell whether a tensor has other values than it had; NaN is as good as NaN."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        return True
    return not torch.equal(tensor, value) and not bool(((tensor == value) | (tensor.isnan() & value.isnan())).all())


def _contents(value: object) -> Any:
    """Copy a container one level deep: modules keep their buffers, hooks and caches in such."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None


def _refill(value: Any, contents: Any) -> None:
    if contents is not None and _identities(value) != _identities(contents):
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(contents)


def _identities(container: Any) -> list[Any]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return [(key, id(item)) for key, item in items]


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


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({tensor.device.index for tensor in _tensors(model) if tensor.is_cuda})
