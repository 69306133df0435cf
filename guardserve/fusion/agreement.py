"""Whether a model and its fused copy answer alike."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from guardserve.exceptions import FusionError
from guardserve.fusion.dataflow import one_line
from guardserve.modes import EvalHold
from guardserve.nonfinite import named_tensors

M = TypeVar("M", bound=nn.Module)

Example: TypeAlias = torch.Tensor | Sequence[Any] | Mapping[str, Any]
"""The only argument of a forward, its positional arguments, or its keyword arguments."""

_TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Call:
    """The arguments of a forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example) -> Call:
        """Read an example."""
        if isinstance(example, torch.Tensor):
            return cls((example,))
        if isinstance(example, Mapping):
            return cls(kwargs=example)
        if isinstance(example, (tuple, list)):
            return cls(tuple(example))
        raise TypeError(f"the example must be a tensor, or a tuple, list or dict of arguments, not {example!r}")

    def copy(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments that a forward may change."""
        return tuple(map(_clone, self.args)), {name: _clone(value) for name, value in self.kwargs.items()}


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def eval_copy(model: M) -> M:
    """Copy a model and put every module of the copy in eval mode, also where ``train()`` is overridden.

    Raises:
        FusionError: If it cannot be copied.
    """
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    # what hooks compute from parameters, such as pruned weights, refuses to be copied with its history
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and not value.is_leaf]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's graphs warn of its own ways to copy them
            duplicate = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise FusionError(
            f"copy.deepcopy() fails on {type(model).__name__} ({one_line(error)}), and fusion works on a copy: "
            "close monitors, give lazy modules a first input, and take off the model what cannot be copied"
        ) from error
    for module in duplicate.modules():
        module.training = False
    return duplicate


def run(
    model: nn.Module, call: Call, watched: Iterable[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, set[int]]]:
    """Run a copy, as a forward may change the model; return its outputs, and the ndim of what enters some modules."""
    model = eval_copy(model)
    ndims: dict[str, set[int]] = defaultdict(set)
    for name in watched:
        model.get_submodule(name).register_forward_pre_hook(_NoteNdim(ndims[name]), with_kwargs=True)
    args, kwargs = call.copy()
    cuda = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    hold = EvalHold(model)
    hold.acquire()
    try:
        with torch.random.fork_rng(list(cuda)):  # every run draws the same numbers
            output = model(*args, **kwargs)
    except Exception as error:
        raise FusionError(f"{type(model).__name__} fails on the example: {one_line(error)}") from error
    finally:
        hold.release()
    return dict(named_tensors(output)), ndims


def check_agreement(model: nn.Module, fused: nn.Module, call: Call) -> None:
    """Compare a model's outputs with those of its fused copy.

    Raises:
        FusionError: If one fails, or an output is missing or differs by more than rounding explains.
    """
    expected, _ = run(model, call)
    actual, _ = run(fused, call)
    _compare(expected, actual, _tolerance(model, expected))


class _NoteNdim:
    """Forward pre-hook that notes the number of dimensions of what enters its module."""

    def __init__(self, seen: set[int]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        self.seen.add(next(chain(args, kwargs.values())).ndim)


def _tolerance(model: nn.Module, outputs: Mapping[str, torch.Tensor]) -> float:
    """Return what half of the digits leave open that the coarsest type in the model and its outputs has."""
    tensors = [t for t in chain(model.parameters(), outputs.values()) if t.is_floating_point() or t.is_complex()]
    eps = [torch.finfo(tensor.dtype).eps for tensor in tensors]
    if any(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors):
        eps.append(_TF32_EPS)  # convolutions may take it there for float32
    return math.sqrt(max(eps, default=torch.finfo(torch.float32).eps))


def _compare(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], allowed: float) -> None:
    advice = "use the model as it is; its forward may branch on what tracing does not show, such as types"
    if expected.keys() != actual.keys() or any(actual[path].shape != y.shape for path, y in expected.items()):
        raise FusionError(f"the fused copy returns other tensors than the model: {advice}")
    for path, y in expected.items():
        if not (y.is_floating_point() or y.is_complex()):
            continue
        finite = y[y.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        differs = (y != actual[path]) & ~(y.isnan() & actual[path].isnan())
        gap = (y - actual[path]).abs()[differs].double()
        error = float(gap.max()) / (scale or 1.0) if gap.numel() else 0.0
        if not error <= allowed:
            raise FusionError(
                f"{path} of the fused copy differs from the model's by {error:.2g} of its largest value, "
                f"more than {allowed:.2g}: {advice}"
            )
