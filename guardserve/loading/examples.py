"""Example inputs: how a factory or a model declares what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch

from guardserve.exceptions import ModelLoadError

_T = TypeVar("_T")

Example: TypeAlias = Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...]
"""Example tensors by the name of the parameter that takes them, or in the order of the parameters."""


def example_input(*tensors: torch.Tensor, **named: torch.Tensor) -> Callable[[_T], _T]:
    """Declare the example input of a model factory or of a model class.

    Dimension 0 of each tensor is the batch, of any size; the other sizes and the dtype are what the model takes::

        @example_input(torch.zeros(1, 3, 224, 224))
        def classifier() -> nn.Module: ...

    Args:
        tensors: One tensor for each parameter of ``forward``, in order.
        named: The same by parameter name.

    Returns:
        A decorator that sets the attribute ``example_input`` and returns what it was given.

    Raises:
        TypeError: No tensor, something else than a tensor, or both positional and named tensors.
    """
    if bool(tensors) == bool(named):
        raise TypeError("example_input takes tensors either by position or by name")
    for value in (*tensors, *named.values()):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"example_input takes tensors, got {type(value).__name__}")

    def declare(target: _T) -> _T:
        target.example_input = named or tensors  # type: ignore[attr-defined]
        return target

    return declare


def find_example(*holders: object) -> Example | None:
    """Return the example that the first of some objects declares, or None when none does.

    An object declares one in its attribute ``example_input``, or in Lightning's ``example_input_array``.

    Raises:
        ModelLoadError: The attribute is neither a tensor nor a tuple, list or dict of tensors.
    """
    for attribute in ("example_input", "example_input_array"):
        for holder in holders:
            value = getattr(holder, attribute, None)
            # a method of that name is the model's own business
            if value is not None and not callable(value):
                return _checked(value, attribute)
    return None


def _checked(value: Any, attribute: str) -> Example:
    example: Example
    if isinstance(value, torch.Tensor):
        example = (value,)
    elif isinstance(value, Mapping):
        example = dict(value)
    else:
        example = tuple(value) if isinstance(value, (tuple, list)) else ()
    tensors = tuple(example.values()) if isinstance(example, Mapping) else example
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ModelLoadError(
            f"{attribute} must be a tensor, or a tuple, list or dict of tensors; it is a {type(value).__name__}"
        )
    return example
