"""Copying a model so that nothing done to the copy reaches the model."""

from __future__ import annotations

import copy
import itertools
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

_SHAREABLE = (fx.Node, types.ModuleType, type(threading.Lock()), type(threading.RLock()))
"""What cannot be copied, and holds nothing that an answer could depend on."""
_MUTABLE = (nn.Module, torch.Tensor, list, dict, set, bytearray)
_DEEPEST = 6


class NotCopyableError(Exception):
    """A model cannot be copied, for the reason given, so that running it could alter it."""


def copied(model: nn.Module) -> nn.Module:
    """Copy a model with all that its modules hold.

    Unlike :func:`copy.deepcopy` alone it also copies tensors that autograd made, lazy buffers, and what functions kept
    on modules have in their closures.

    Raises:
        NotCopyableError: It cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            notes = getattr(module, "meta", None)
            if type(module).__module__.startswith("torch.") and isinstance(notes, dict):
                memo[id(notes)] = dict(notes)  # on a graph, with tensors without values
        for value in _held(model):
            _prepare(value, memo)
        made: object = copy.deepcopy(model, memo)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise NotCopyableError(f"it cannot be copied ({type(error).__name__}: {line:.120})") from error
    if not isinstance(made, nn.Module):
        raise NotCopyableError(f"its copy is a {type(made).__name__}")
    return made


def check_independence(model: nn.Module, copy: nn.Module) -> None:
    """Check that nothing done to a copy reaches the model, whatever a class makes of copying.

    Raises:
        NotCopyableError: The two share something.
    """
    if not _identities(model).isdisjoint(_identities(copy)):
        raise NotCopyableError("its copy shares modules or tensors with it")


def _held(model: nn.Module) -> Iterator[Any]:
    """Yield what the modules of a model hold as attributes, and what is in such containers."""
    seen: set[int] = set()
    modules = (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
    pending = [(value, 0) for module in modules for value in vars(module).values()]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple, set, frozenset, Mapping)) and depth < _DEEPEST:
            items = value.values() if isinstance(value, Mapping) else value
            pending += [(item, depth + 1) for item in items]
        else:
            yield value


def _prepare(value: Any, memo: dict[int, Any]) -> None:
    """Copy what deepcopy would refuse to copy, or would share."""
    if id(value) in memo:
        return
    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, UninitializedBuffer) and is_lazy(value):
            memo[id(value)] = _uninitialised(value)
    elif isinstance(value, _SHAREABLE):
        memo[id(value)] = value
    elif isinstance(value, types.FunctionType) and has_memory(value):
        _rebind(value, memo)


def _uninitialised(buffer: torch.Tensor) -> torch.Tensor:
    make: Any = UninitializedBuffer
    made: torch.Tensor = make(device=buffer.device, dtype=buffer.dtype)
    return made


def _rebind(function: types.FunctionType, memo: dict[int, Any]) -> None:
    """Copy a function whose closure holds something that can change, the model itself for example."""
    cells = function.__closure__ or ()
    empty = tuple(types.CellType() for _ in cells)
    bound = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, empty)
    bound.__kwdefaults__, bound.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    memo[id(function)] = bound  # before its cells, which may lead back to it
    for cell, new in zip(cells, empty, strict=True):
        contents = _contents(cell)
        _prepare(contents, memo)
        new.cell_contents = copy.deepcopy(contents, memo)


def has_memory(function: types.FunctionType, depth: int = 0) -> bool:
    """Tell whether a function's closure holds anything that can change."""
    contents = map(_contents, function.__closure__ or ())
    return any(
        isinstance(value, _MUTABLE)
        or (isinstance(value, types.FunctionType) and depth < _DEEPEST and has_memory(value, depth + 1))
        for value in contents
    )


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is not bound yet
        return None


def _identities(model: nn.Module) -> set[Any]:
    """Return what tells the modules, tensors and functions with a state of one model from those of another."""
    found: set[Any] = set(map(id, model.modules()))
    tensors = itertools.chain(model.parameters(), model.buffers())
    for value in itertools.chain(tensors, _held(model)):
        if isinstance(value, torch.Tensor):
            found |= {id(value), *_memory(value)}
        elif isinstance(value, types.FunctionType) and has_memory(value):
            found.add(id(value))
    return found


def _memory(tensor: torch.Tensor) -> set[tuple[str, int]]:
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # lazy, sparse or of another device's own kind
        return set()
    return {("storage", address)} if address else set()
