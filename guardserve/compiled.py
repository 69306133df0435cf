"""Looking inside ``torch.compile``: operators that a graph calls where the model's layers would look.

A graph is guarded, at every forward, by all that it came to by way of the model's modules when it was made. So what it
knows of a monitor are strings, which are constants of its own, and by which the operators find who is to look.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

Glance = Callable[[torch.Tensor], bool]
"""Called where somebody would look; says whether that will do."""


class Looking(Protocol):
    """Who looks at what enters a layer."""

    def look(self, x: torch.Tensor) -> None:
        """Look at it, in a forward or outside of one."""


class Following(Protocol):
    """Who follows the forwards of a model."""

    def enter(self, inputs: Sequence[torch.Tensor], *, whole: bool) -> None:
        """Begin one, with some inputs or with all of them."""

    def leave(self) -> None:
        """End it."""


_looking: weakref.WeakValueDictionary[str, Looking] = weakref.WeakValueDictionary()
_glances: dict[str, Glance] = {}
_following: weakref.WeakValueDictionary[str, Following] = weakref.WeakValueDictionary()
_names = itertools.count()

_library: Any = torch.library.Library("guardserve", "FRAGMENT")  # type: ignore[no-untyped-call]

_TAGS = [getattr(torch.Tag, name) for name in ("flexible_layout", "cudagraph_unsafe") if hasattr(torch.Tag, name)]
"""Or a graph would copy what has another layout in it than in eager code; and CUDA graphs replay no Python."""


def _define(signature: str, kernel: Callable[..., None]) -> Any:
    """Define an operator that a compiler keeps, and keeps in order: it says that it writes to ``mark``."""
    name = signature.partition("(")[0]
    _library.define(signature, tags=_TAGS)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    for key in ("Meta", "FuncTorchBatched"):
        _library.impl(name, _show_nothing, key)
    return getattr(torch.ops.guardserve, name).default


def _look(x: torch.Tensor, place: str, mark: torch.Tensor) -> None:
    del mark
    glance = _glances.get(place)
    if glance is None or not glance(x):
        who = _looking.get(place)
        if who is not None:
            who.look(x)


def _show_nothing(*_: object) -> None:
    """Show nothing of what has no values. As graphs are made with such, inductor learns here how to write looks."""
    if (inductor := sys.modules.get("torch._inductor.lowering")) is not None:
        with suppress(AttributeError, TypeError):  # another than those known, or not whole yet
            _shorten(inductor)


@functools.cache
def _shorten(inductor: Any) -> None:
    """Have the code that inductor writes look without torch's dispatcher, which takes longer than a look does."""
    usual = inductor.fallback_handler(_look_operator)

    def lower(*args: object) -> object:
        written = usual(*args)
        with suppress(AttributeError, IndexError):
            graph = inductor.V.graph
            kernel = graph.operations[-1]
            if kernel.op_overload is _look_operator and not graph.cpp_wrapper:
                kernel.python_kernel_name = "torch.ops.guardserve.look.quick"
        return written

    inductor.add_needs_realized_inputs(_look_operator)
    inductor.register_lowering(_look_operator, type_promotion_kind=None)(lower)


def _look_quickly(x: torch.Tensor, place: str, mark: torch.Tensor) -> None:
    """Do what the operator does."""
    glance = _glances.get(place)
    if glance is None or not glance(x):
        _look_operator(x, place, mark)


def _enter(inputs: list[torch.Tensor], whole: bool, place: str, mark: torch.Tensor) -> None:
    del mark
    who = _following.get(place)
    if who is not None:
        who.enter(inputs, whole=whole)


def _leave(place: str, mark: torch.Tensor) -> None:
    del mark
    who = _following.get(place)
    if who is not None:
        who.leave()


_look_operator = _define("look(Tensor x, str place, Tensor(a!) mark) -> ()", _look)
_enter_operator = _define("enter(Tensor[] inputs, bool whole, str place, Tensor(a!) mark) -> ()", _enter)
_leave_operator = _define("leave(str place, Tensor(a!) mark) -> ()", _leave)

torch.ops.guardserve.look.quick = _look_quickly  # type: ignore[attr-defined]

# on the CPU, and said to be written to: where CUDA graphs are not divided at operators, that keeps looks out of them
with torch.inference_mode(mode=False):
    _mark = torch.zeros((), device="cpu")


def place_of_look(who: Looking) -> str:
    """Return what graphs find one by that looks, for as long as it is there."""
    place = f"layer {next(_names)}"
    _looking[place] = who
    weakref.finalize(who, _glances.pop, place, None)
    return place


def glance_at(place: str, glance: Glance | None) -> None:
    """Have graphs try a quicker way first, or none any more."""
    if glance is not None:
        _glances[place] = glance
    else:
        _glances.pop(place, None)


def place_of_forwards(who: Following) -> str:
    """Return what graphs find one by that follows forwards, for as long as it is there."""
    place = str(next(_names))
    _following[place] = who
    return place


def look_in_graph(place: str, x: torch.Tensor) -> None:
    """Have a graph look, in code that is being compiled; nobody does where there is no place."""
    if place and not exporting():
        _look_operator(x.detach(), place, _mark)


def enter_in_graph(place: str, inputs: Sequence[object]) -> None:
    """Have a graph begin a forward."""
    if not exporting():
        tensors = [value.detach() for value in inputs if isinstance(value, torch.Tensor)]
        _enter_operator(tensors, len(tensors) == len(inputs), place, _mark)


def leave_in_graph(place: str) -> None:
    """Have a graph end it."""
    if not exporting():
        _leave_operator(place, _mark)


def exporting() -> bool:
    """Tell whether a program is being exported: nobody is served by that."""
    is_exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting()


fake_mode = functools.partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE)  # noqa: SLF001
"""Returns something where this thread computes with tensors that hold nothing, as ``torch.export`` does."""


def uncompiled(method: Callable[..., None]) -> Callable[..., None]:
    """Keep a method, and what it calls, from being compiled by itself; where it is called in a graph it is traced.

    It is like ``torch.compiler.disable``, which would import the whole compiler, and break a larger graph.
    """
    if not skip(method):
        disabled: Callable[..., None] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        return disabled
    return method


def skip(function: Callable[..., None]) -> bool:
    """Have the compiler pass over a function and what it calls, but not within a graph; torch before 2.7 cannot."""
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)  # noqa: SLF001 - public has none
    if not hasattr(frames, "set_code_exec_strategy"):
        return False
    action = frames._FrameAction.SKIP  # noqa: SLF001
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action, action))  # noqa: SLF001
    return True
