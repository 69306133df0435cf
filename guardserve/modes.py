"""Holding a model in eval mode for any number of overlapping holders.

``Module.training`` is a plain attribute that all threads share. A holder that saved it on entry and put
it back on exit would put the model back in training under a second holder that is still inside. So a
module that was found training is switched to eval once, counted for every hold that needs it so, and
switched back when the last of them lets go.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from guardserve.batchnorm import FusedBatchNorm, GraphBatchNorm
from guardserve.inlets import Handle, has_inlet, on_input
from guardserve.walks import hold_only, is_training

# All are guarded by _LOCK. A module is in _switched while at least one hold needs it in eval mode and it was
# training before the first of them came. _holds are those that somebody is in.
_LOCK = threading.Lock()
_switched: Counter[nn.Module] = Counter()
_holds: list[EvalHold] = []

# What was dropped without being left. The garbage collector finds that at any time, also in a thread that has _LOCK: it
# is let go of as soon as the lock is free.
_abandoned: deque[EvalHold] = deque()


class EvalHold:
    """Keeps the modules of one model in eval mode between :meth:`acquire` and :meth:`release`.

    Flags are written to each module directly: a subclass may override ``train()``, and a program from
    ``torch.export`` raises in it. Layers whose output depends on the flag (BatchNorm, InstanceNorm, Dropout
    and leaves of classes that are not torch's) are also looked at as they run, so that a ``.train()`` called *inside* a
    forward does not reach theirs.

    Attributes:
        depth: Number of holders inside now, over all threads.
        generation: Grows when the tree of modules is found to have changed.
        interventions: Times a hook found its layer training inside a held forward and put it in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.depth = 0
        self.interventions = 0
        self.generation = 0
        self._held: list[tuple[nn.Module, MutableMapping[str, Any]]] = []
        self._hooks: dict[nn.Module, Handle] = {}
        self._survey()

    def acquire(self) -> list[nn.Module]:
        """Put every module in eval mode until the matching :meth:`release`.

        Returns:
            The modules that were found training: none for a model that its owner has put in eval mode.
        """
        with _LOCK:
            if not hold_only(self._containers, self._children):
                self._survey()
            joining = self.depth == 0 and bool(_switched)
            found = self._switch_to_eval() if joining or is_training(self._flags) else []
            if self.depth == 0:
                _holds.append(self)
            self.depth += 1
        if _abandoned:
            _let_go_of_abandoned()
        return found

    def release(self) -> list[nn.Module]:
        """Let go; the last holder gives every module its own flag back.

        Returns:
            The modules that somebody put in training mode during the hold.
        """
        with _LOCK:
            flipped = self._release() if self.depth else []  # closed meanwhile
        if _abandoned:
            _let_go_of_abandoned()
        return flipped

    def names(self, modules: Iterable[nn.Module]) -> list[str]:
        """Return the qualified names of some of the model's modules; the model itself is ``''``."""
        wanted = set(modules)
        return [name for name, module in self.model.named_modules() if module in wanted]

    def close(self) -> None:
        """Let go for every holder, and remove the hooks from the model."""
        with _LOCK:
            self._close()
        _let_go_of_abandoned()

    def abandon(self) -> None:
        """Do what :meth:`close` does, as soon as that can be done without waiting for anybody: for finalizers."""
        _abandoned.append(self)
        _let_go_of_abandoned()

    def _close(self) -> None:
        while self.depth:
            self._release()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def _release(self) -> list[nn.Module]:
        flipped = [] if hold_only(self._containers, self._children) else self._newcomers()
        if is_training(self._flags):
            flipped += self._switch_to_eval()
        self.depth -= 1
        if self.depth == 0:
            _holds.remove(self)
            for module, flags in self._held:
                others = _switched[module] - 1
                if others:
                    _switched[module] = others
                else:
                    del _switched[module]
                    flags["training"] = True
            self._held = []
        return flipped

    def _newcomers(self) -> list[nn.Module]:
        """Take in the modules that were made during the hold, in training mode as modules are; return those."""
        known = set(self._modules)
        self._survey()
        made = [
            (m, flags)
            for m, flags in zip(self._modules, self._flags, strict=True)
            if m not in known and flags["training"]
        ]
        for _, flags in made:
            flags["training"] = False
        self._held += made
        _switched.update(m for m, _ in made)
        return [m for m, _ in made]

    def _switch_to_eval(self) -> list[nn.Module]:
        """Switch what is training to eval and register it, unless it is registered; return what was training."""
        found = [(m, flags) for m, flags in zip(self._modules, self._flags, strict=True) if flags["training"]]
        for _, flags in found:
            flags["training"] = False
        if self.depth == 0:
            # what another hold has switched must also wait for this one
            held = [pair for pair in zip(self._modules, self._flags, strict=True) if pair[0] in _switched]
            # and what somebody flipped during another hold was not training before it
            flipped = {m for hold in _holds for m in hold._modules} if found and _holds else set()  # noqa: SLF001
            self._held = held + [pair for pair in found if pair[0] not in _switched and pair[0] not in flipped]
            _switched.update(m for m, _ in self._held)
        return [m for m, _ in found]

    def _survey(self) -> None:
        """List the modules anew; called when the tree has changed since the last time."""
        self.generation += 1
        self._modules = list(self.model.modules())
        self._flags: list[MutableMapping[str, Any]] = [
            vars(m) if "training" in vars(m) else _Attributes(m) for m in self._modules
        ]
        self._containers = [c for c in (vars(m).get("_modules") for m in self._modules) if isinstance(c, dict)]
        self._children = tuple(chain.from_iterable(map(dict.values, self._containers)))
        for module in self._modules:
            if module not in self._hooks and _heeds_flag(module):
                self._hooks[module] = _look_after(module, _KeepEval(self))


def _let_go_of_abandoned() -> None:
    """Close what was abandoned, unless somebody has the lock: who then comes here when it is free."""
    while _abandoned and _LOCK.acquire(blocking=False):
        try:
            if _abandoned:
                _abandoned.popleft()._close()  # noqa: SLF001
        finally:
            _LOCK.release()


def _heeds_flag(module: nn.Module) -> bool:
    """Tell whether a layer's own forward may depend on its flag."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    known = isinstance(module, (_NormBase, _DropoutNd, nn.RReLU, nn.RNNBase, nn.MultiheadAttention))
    foreign = not (
        isinstance(module, (FusedBatchNorm, GraphBatchNorm)) or type(module).__module__.startswith("torch.nn.modules.")
    )
    return known or (foreign and next(module.children(), None) is None)


def _look_after(module: nn.Module, keep: _KeepEval) -> Handle:
    """Have a layer put back in eval mode before it does anything."""
    if has_inlet(module):
        return on_input(module, partial(keep, module), training=True)
    own = vars(module).get("_forward_pre_hooks")
    if type(own) is OrderedDict and not own:  # else there are handles that know it
        vars(module)["_forward_pre_hooks"] = _Hooks()
    return module.register_forward_pre_hook(keep)


class _KeepEval:
    """Puts its layer back in eval mode while a hold is on.

    A copy or a pickle of the model carries a hook without a hold, which does nothing.
    """

    def __init__(self, hold: EvalHold | None) -> None:
        self.hold = hold

    def __call__(self, module: nn.Module, args: object) -> None:
        del args
        if module.training and self.hold is not None and self.hold.depth:
            vars(module)["training"] = False
            with _LOCK:
                self.hold.interventions += 1
            _let_go_of_abandoned()

    def __reduce__(self) -> tuple[type[_KeepEval], tuple[None]]:
        return _KeepEval, (None,)


class _Hooks(OrderedDict[int, Any]):
    """Pre-hooks of a layer, which has items for the guard's too, but no values.

    A forward reads the items. ``torch.jit.script``, which would compile all hooks, and tools that move a layer's hooks
    elsewhere, read the values.
    """

    def values(self) -> Any:
        """Return the hooks that are not the guard's."""
        return [hook for hook in super().values() if not isinstance(hook, _KeepEval)]


class _Attributes(MutableMapping[str, Any]):
    """The attributes of a module that keeps its flag elsewhere than in its ``__dict__``, as TorchScript does."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Any:
        return getattr(self._module, name, False)  # a frozen one has none: it is in eval mode for good

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._module, name)

    def __iter__(self) -> Iterator[str]:
        return iter(("training",))

    def __len__(self) -> int:
        return 1
