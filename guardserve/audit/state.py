"""What a forward has changed in a model, seen beside an untouched one."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from guardserve.audit.copies import has_memory

_DEEPEST = 6
_TABLES = ("_parameters", "_buffers")
"""Attributes of a module that hold others of its attributes by name."""
_LEFT_OUT = frozenset(["training", "_modules", "_non_persistent_buffers_set"])
"""Flags belong to whoever holds a model in a mode, and modules are looked at one by one."""
_VALUES = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, type, type(None), slice)


class StateChange:
    """The differences between a model and a copy of it that has run.

    Args:
        before: The untouched model.
        after: The copy.

    Attributes:
        names: Names of the parameters, buffers and other attributes of modules that differ.
        certain: Whether everything could be looked into, so that there are no others.
    """

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        self.certain = True
        self.names = tuple(self._compare(before, after))

    def _compare(self, before: nn.Module, after: nn.Module) -> Iterator[str]:
        modules = dict(after.named_modules())
        for name, module in before.named_modules():
            other = modules.pop(name, None)
            if other is None:
                yield name
                continue
            self.certain &= getattr(module, "training", False) == getattr(other, "training", False)
            now = self._attributes(other)
            for attribute, value in self._attributes(module).items():
                if attribute not in now or self._differ(value, now[attribute]):
                    yield _join(name, attribute)
                now.pop(attribute, None)
            yield from (_join(name, attribute) for attribute in now)
        yield from modules

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        if isinstance(module, torch.jit.ScriptModule):
            self.certain = False
            return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        own = {}
        for name, value in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs")):
                self.certain &= not value
            elif name not in _LEFT_OUT and name not in _TABLES:
                own[name] = value
        for table in _TABLES:
            own |= vars(module).get(table) or {}
        return own

    def _differ(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Tell whether two values differ, as far as they can be looked into."""
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            return self._tensors_differ(one, other)
        if type(one) is not type(other):
            return True
        if isinstance(one, _VALUES):
            return bool(one != other) and not (one != one and other != other)  # noqa: PLR0124 - NaN
        if isinstance(one, np.ndarray):
            return not np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
        if isinstance(one, types.FunctionType):
            self.certain &= not has_memory(one)
            return False
        return depth < _DEEPEST and self._contents_differ(one, other, depth + 1)

    def _contents_differ(self, one: Any, other: Any, depth: int) -> bool:
        if isinstance(one, Mapping):
            return one.keys() != other.keys() or any(self._differ(one[key], other[key], depth) for key in one)
        if isinstance(one, (list, tuple)):
            return len(one) != len(other) or any(self._differ(a, b, depth) for a, b in zip(one, other, strict=True))
        if isinstance(one, (types.BuiltinFunctionType, types.ModuleType)):
            return False
        self.certain = False
        if isinstance(one, (set, frozenset)):
            return len(one) != len(other)
        attributes = getattr(one, "__dict__", None)
        # of torch's own there are graphs, handles and the like
        known = attributes is not None and not type(one).__module__.startswith("torch.")
        return known and self._differ(attributes, vars(other), depth)

    def _tensors_differ(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Tell whether two tensors have other values; NaN is as good as NaN."""
        if is_lazy(one) or is_lazy(other) or one.is_meta or other.is_meta:
            return is_lazy(one) != is_lazy(other)
        if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
            return True
        if one.layout is not torch.strided or one.is_nested:
            self.certain = False
            return False
        one, other = one.detach(), other.detach()
        return not torch.equal(one, other) and not bool(((one == other) | (one.isnan() & other.isnan())).all())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
