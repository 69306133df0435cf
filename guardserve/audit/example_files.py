"""Example inputs in files, and what has to be done to them before a model takes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from guardserve.audit.layers import module_weights
from guardserve.exceptions import InputError
from guardserve.loading.files import reason

_NUMBERED = re.compile(r"arr_([0-9]+)")


def load_example(path: Path) -> Any:
    """Read example inputs from a .npy, .npz or .safetensors file.

    Returns:
        One tensor, a tuple of numbered ones, or a dict of tensors by input name.

    Raises:
        InputError: The file cannot be read, or holds anything but numbers.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - importing guardserve loads torch only

            named: dict[str, torch.Tensor] = load_file(path)
        else:
            loaded = np.load(path, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded.items())
            named = {name: _tensor(name, array) for name, array in arrays.items()}
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:
        raise InputError(f"{path} is not a readable .npy, .npz or .safetensors file: {reason(error)}") from error
    if not named:
        raise InputError(f"{path} holds no arrays")
    if len(named) == 1:
        return next(iter(named.values()))
    if all(_NUMBERED.fullmatch(name) for name in named):
        return tuple(named[name] for name in sorted(named, key=lambda name: int(name[len("arr_") :])))
    return named


def _tensor(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        # torch knows the byte order of this machine only
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        which = f"{name!r}, " if name else ""
        raise InputError(f"holds {which}an array of {array.dtype}: example inputs are arrays of numbers") from error


def fitted(example: Any, model: nn.Module) -> tuple[Any, str]:
    """Convert floating-point inputs to the type of the model's weights: files mostly hold numpy's float64.

    Returns:
        The example, and what was converted, in words; empty when nothing was.
    """
    types = {weight.dtype for _, weight in module_weights(model) if weight.is_floating_point()}
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    others = {leaf.dtype for leaf in leaves} - types
    if len(types) != 1 or not others:
        return example, ""
    (wanted,) = types
    converted = tree_map(
        lambda leaf: leaf.to(wanted) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, example
    )
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
    return converted, f"converted from {names} to {str(wanted).removeprefix('torch.')}"
