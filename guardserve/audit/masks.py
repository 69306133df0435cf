"""Telling minus infinity that is meant, as in a mask, from damage."""

from __future__ import annotations

from typing import Any

import torch

from guardserve.nonfinite import named_tensors
from guardserve.tracing import NonFiniteOrigin

_WRITTEN = ("masked_fill", "where", "full", "fill", "index_put", "scatter", "index_fill", "scalar_tensor", "new_full")
"""Operators by which code puts a constant of its own into a tensor."""


def infinite_places(output: Any, path: str) -> torch.Tensor | None:
    """Return where a tensor is minus infinity, for each row; None when it is NaN or plus infinity anywhere."""
    tensor = dict(named_tensors(output)).get(path)
    if tensor is None or tensor.is_complex() or tensor.layout is not torch.strided or not tensor.ndim:
        return None
    places = tensor.isneginf()
    return places if bool((places | tensor.isfinite()).all()) else None


def by_design(origin: NonFiniteOrigin | None, here: torch.Tensor | None, there: torch.Tensor | None) -> str | None:
    """Tell why minus infinity looks deliberate; None when it does not."""
    if here is None:
        return None
    operator = (origin.operator or "").rpartition(".")[2].rstrip("_") if origin else ""
    if operator in _WRITTEN:
        return f"`{operator}` writes minus infinity there, as masks do"
    if there is None or here.shape[1:] != there.shape[1:]:
        return None
    by_row = here.ndim > 1 and not here[0].all() and bool((here == here[:1]).all()) and bool((there == here[:1]).all())
    if by_row or (here.shape == there.shape and torch.equal(here, there) and not here.all()):
        return "it is minus infinity in the same places for every input, as masks are"
    return None
