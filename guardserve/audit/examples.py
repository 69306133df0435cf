"""Example inputs: choosing rows, and making up other rows that could stand beside them in a batch."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from guardserve.audit.report import join
from guardserve.exceptions import InputError
from guardserve.nonfinite import is_finite

WILD = 2
"""The variant of made-up rows that may leave the range of the example."""


@dataclass(frozen=True)
class Example:
    """Inputs of a forward, several rows of them; the first axis of a tensor is the batch.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        rows: Number of rows.
        batched: Places, among all leaves of the inputs, of the tensors that have a batch axis; the others are passed
            on as they are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    batched: frozenset[int]

    @classmethod
    def of(cls, value: Any, model: nn.Module) -> Example:
        """Read a tensor, a tuple of them, or a dict of them by parameter name, and put it on the model's device.

        A dict goes to a forward as keywords if it takes them, else as its one argument. The batch is what most tensors
        have for a first axis, or else the first one that is longer than 1.

        Raises:
            InputError: It holds no tensor with a batch axis, or names that the forward does not take.
        """
        args, kwargs = (tuple(value), {}) if isinstance(value, (tuple, list)) else ((value,), {})
        if isinstance(value, Mapping) and _takes(model, value):
            args, kwargs = (), dict(value)
        device = next((parameter.device for parameter in model.parameters()), None)
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [_placed(leaf, device) for leaf in leaves]
        lengths = [len(leaf) if isinstance(leaf, torch.Tensor) and leaf.ndim else 0 for leaf in leaves]
        rows = _rows(lengths)
        if not rows:
            shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            raise InputError(
                "an example is a tensor, or a tuple or dict of tensors, whose first axis is the batch and is not "
                f"empty; this one is a {type(value).__name__} of {shapes}"
            )
        args, kwargs = tree_unflatten(leaves, structure)
        return cls(args, kwargs, rows, frozenset(place for place, length in enumerate(lengths) if length == rows))

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword inputs."""
        return self.args, self.kwargs

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        leaves = tree_leaves((self.args, self.kwargs))
        return all(is_finite(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))

    def sharing(self, places: Collection[int]) -> Example:
        """Return the same inputs, some of which have no batch axis after all."""
        return replace(self, batched=self.batched.difference(places))

    def take(self, rows: Sequence[int]) -> Example:
        """Return some of the rows."""
        return self._map(lambda tensor: tensor[list(rows)], len(rows))

    def shortest_first(self) -> Example:
        """Return it with the row first whose whole numbers hold the most zeros.

        Zeros are what shorter sequences are filled up with, and a model that looks as far as the longest row of a batch
        has mates tell on the shorter ones only.
        """
        leaves = tree_leaves((self.args, self.kwargs))
        numbers = [leaf for i, leaf in enumerate(leaves) if i in self.batched and not leaf.is_floating_point()]
        zeros = [int(sum((tensor[row] == 0).sum() for tensor in numbers)) for row in range(self.rows)]
        first = zeros.index(max(zeros))
        return self.take([first, *(row for row in range(self.rows) if row != first)]) if first else self

    def among(self, count: int, variant: int) -> Example:
        """Return a batch with the first row in the middle, and other rows around it.

        Args:
            count: Number of rows.
            variant: 0 takes the other rows from the example as far as they go. What is made up has the first row's
                values in another order and scale; only in variant 2 it leaves the range of the first row.
        """
        place = middle(count)

        def surround(tensor: torch.Tensor) -> torch.Tensor:
            others = list(tensor[1:count]) if variant == 0 else []
            seeds = range(1 + count * variant + len(others), count * (variant + 1))
            others += [_stranger(tensor[0], seed, bounded=variant < WILD) for seed in seeds]
            return torch.stack([*others[:place], tensor[0], *others[place:]])

        return self._map(surround, count)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], rows: int) -> Example:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        changed = [change(leaf) if place in self.batched else leaf for place, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(changed, structure)
        return replace(self, args=args, kwargs=kwargs, rows=rows)


def _placed(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        leaf = torch.from_numpy(np.array(leaf, dtype=leaf.dtype.newbyteorder("=")))
    return leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf


def _rows(lengths: Sequence[int]) -> int:
    """Return the length that is the batch's: the commonest, and of those the first that is longer than 1."""
    counts = Counter(length for length in lengths if length)
    commonest = [length for length, count in counts.items() if count == max(counts.values())]
    return next((length for length in commonest if length > 1), max(commonest, default=0))


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
    strange = [name for name in named if name not in parameters]
    if strange and (len(strange) < len(named) or len(parameters) > 1):
        raise InputError(
            f"the example has {join(map(repr, strange))}, which the forward does not take: it takes "
            f"{join(map(repr, parameters))}"
        )
    return not strange


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
    # far to both sides, so that minima and maxima over the batch go with it, and unequally so that means do
    side = -6 if seed % 2 else 3
    if not one_sign:
        return row + (noise + side) * spread
    return values * 0.05 if side < 0 else (row + (noise + side) * spread).abs().to(row.dtype)


def _other_constant(row: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a row of another constant than this one's, where there may be such: a neighbouring index or label."""
    if row.dtype is torch.bool:
        return ~row if seed % 2 else row.clone()
    return torch.where(row > 0, row - 1, row + 1) if seed % 2 else row.clone()
