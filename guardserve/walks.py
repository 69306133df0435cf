"""Walks through what is watched of each module: their memory is what a forward has driven from the caches."""

from __future__ import annotations

from itertools import chain
from operator import is_, itemgetter
from typing import Any

__all__ = ["bit_sum", "hold_only", "is_training"]

_training = itemgetter("training")

try:
    from guardserve.native import bit_sum, hold_only, is_training
except ImportError:  # it was not compiled

    def bit_sum(x: object, /) -> int | None:
        """Sum a tensor's bit patterns, or tell by None that it is to be done otherwise."""
        del x
        return None

    def is_training(attributes: list[Any], /) -> bool:
        """Tell whether any of a list of mappings has a true ``"training"``."""
        return any(map(_training, attributes))

    def hold_only(dicts: list[dict[str, Any]], values: tuple[Any, ...], /) -> bool:
        """Tell whether the values of dicts are those of a tuple, in order, and no others."""
        found = [*chain.from_iterable(map(dict.values, dicts))]
        return len(found) == len(values) and all(map(is_, found, values))
