"""Example inputs: choosing rows, and making up other rows that could stand beside them in a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from guardserve.exceptions import InputError
from guardserve.nonfinite import is_finite

WILD = 2
"""The variant of made-up rows that may leave the range of the example."""


@dataclass(frozen=True)
class Example:
    """Inputs of a forward, several rows of them; the first axis of each tensor is the batch.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        rows: Number of rows. A tensor whose first axis has another size has no batch axis, and is passed on as it is.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int

    @classmethod
    def of(cls, value: Any, model: nn.Module) -> Example:
        """Read a tensor, a tuple of them, or a dict of them by parameter name, and put it on the model's device.

        A dict goes to a forward as keywords if it takes them, else as its one argument.

        Raises:
            InputError: It holds no tensor with a batch axis.
        """
        args, kwargs = (tuple(value), {}) if isinstance(value, (tuple, list)) else ((value,), {})
        if isinstance(value, Mapping) and _takes(model, value):
            args, kwargs = (), dict(value)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        rows = next((len(tensor) for tensor in tensors if tensor.ndim), 0)
        if not rows:
            raise InputError(
                "an example is a tensor, or a tuple or dict of tensors, whose first axis is the batch and is not "
                f"empty; this one is a {type(value).__name__} of {[tuple(tensor.shape) for tensor in tensors]}"
            )
        device = next((parameter.device for parameter in model.parameters()), None)
        return _mapped(lambda tensor: tensor.detach().to(device), args, kwargs, rows)

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        leaves = tree_leaves((self.args, self.kwargs))
        return all(is_finite(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))

    def take(self, rows: Sequence[int]) -> Example:
        """Return some of the rows."""
        return self._map(lambda tensor: tensor[list(rows)] if self._is_batch(tensor) else tensor, len(rows))

    def among(self, count: int, variant: int) -> Example:
        """Return a batch with the first row in the middle, and other rows around it.

        Args:
            count: Number of rows.
            variant: 0 takes the other rows from the example as far as they go. What is made up has the first row's
                values in another order and scale; only in variant 2 it leaves the range of the first row.
        """
        place = middle(count)

        def surround(tensor: torch.Tensor) -> torch.Tensor:
            if not self._is_batch(tensor):
                return tensor
            others = list(tensor[1:count]) if variant == 0 else []
            seeds = range(1 + count * variant + len(others), count * (variant + 1))
            others += [_stranger(tensor[0], seed, bounded=variant < WILD) for seed in seeds]
            return torch.stack([*others[:place], tensor[0], *others[place:]])

        return self._map(surround, count)

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self.rows

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], rows: int) -> Example:
        return _mapped(change, self.args, self.kwargs, rows)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], args: Any, kwargs: Any, rows: int) -> Example:
    args, kwargs = tree_map(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    return Example(args, kwargs, rows)


def middle(count: int) -> int:
    """Return the place of the first row among strangers: not at an end, so that both sides are its mates."""
    return count // 2


def _takes(model: nn.Module, named: Mapping[str, Any]) -> bool:
    """Tell whether a model's forward takes these keywords."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return True
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    return all(name in parameters for name in named)


def _stranger(row: torch.Tensor, seed: int, *, bounded: bool) -> torch.Tensor:
    """Make up another row, deterministically."""
    generator = torch.Generator().manual_seed(seed)
    values = row.flatten()[torch.randperm(row.numel(), generator=generator).to(row.device)].view(row.shape)
    if not (row.is_floating_point() or row.is_complex()):
        return values if bool((values != row).any()) else _other_constant(row, seed)
    noise = torch.randn(row.shape, generator=generator).to(row.device, row.dtype)
    size = row.abs()
    one_sign = bool((row.real >= 0).all()) and bool((size > 0).any())
    if bounded and row.is_floating_point() and bool(size.max() > size.min()):
        # towards a value of the row: its mean and its spread both change
        towards, part = values.flatten()[0], 0.1 + 0.5 * torch.rand((), generator=generator).item()
        return towards + (values - towards) * part
    spread = size.max() if bool(size.max() > size.min()) else 1 + size
    made_up = row + (noise + 3) * spread  # far to one side, so that a mean over the batch goes with it
    return made_up.abs().to(row.dtype) if one_sign else made_up


def _other_constant(row: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a row of another constant than this one's, where there may be such: a neighbouring index or label."""
    if row.dtype is torch.bool:
        return ~row if seed % 2 else row.clone()
    return torch.where(row > 0, row - 1, row + 1) if seed % 2 else row.clone()
