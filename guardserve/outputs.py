"""What a model returns, as named tensors with the batch first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from guardserve.exceptions import ModelOutputError
from guardserve.signature import DATATYPES, TensorSpec


def named_outputs(output: object, rows: int) -> dict[str, torch.Tensor]:
    """Name the tensors that a model returns, and check that they can be served.

    A tensor is ``output``, the items of a tuple or list are ``output_0`` and so on, those of a named tuple
    or a mapping have their own names.

    Args:
        output: What the model's forward returned.
        rows: Size of the batch that it was given.

    Raises:
        ModelOutputError: If it is anything else, holds nothing, or an item is not a dense tensor of a servable
            type with a row for each sample.
    """
    items: dict[str, Any]
    if isinstance(output, torch.Tensor):
        items = {"output": output}
    elif isinstance(output, Mapping):
        items = {str(key): item for key, item in output.items()}
        if len(items) < len(output):
            raise ModelOutputError(f"several outputs have the same name among {sorted(items)}: name them by strings")
    elif isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", [f"output_{index}" for index in range(len(output))])
        items = dict(zip(names, output, strict=True))
    else:
        items = {"output": output}
    if not items:
        raise ModelOutputError("the model returned no output at all")
    for name, item in items.items():
        _check(name, item, rows)
    return items


def _check(name: str, item: object, rows: int) -> None:
    if not isinstance(item, torch.Tensor):
        raise ModelOutputError(
            f"{name} of the model's result is a {type(item).__name__}: "
            "wrap the model so that it returns tensors, or a tuple or dict of tensors"
        )
    if item.dtype not in DATATYPES.values() or item.layout is not torch.strided or item.is_nested:
        raise ModelOutputError(
            f"{name} is a tensor of {item.dtype} and {item.layout}, which the protocol cannot carry: "
            "convert it to a dense real tensor in the model"
        )
    if item.ndim == 0 or len(item) != rows:
        raise ModelOutputError(
            f"{name} has shape {tuple(item.shape)} for a batch of {rows}: "
            "each output must have the batch as its first dimension"
        )


def output_specs(small: Mapping[str, torch.Tensor], large: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Describe outputs by two forwards whose free input sizes differ: a size that differs too is free (-1)."""
    return tuple(
        TensorSpec(
            name,
            tensor.dtype,
            tuple(a if a == b else -1 for a, b in zip(tensor.shape, large[name].shape, strict=True)),
        )
        for name, tensor in small.items()
    )
