"""Samples that a reference has several times: four epochs over 150 samples are no reference of 600."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

COMMON = 10
"""A sample that comes this many times as often as samples do on average is one that production has often, too."""


def without_repeats(keys: npt.NDArray[np.integer], *, ordered: bool = False) -> npt.NDArray[np.bool_]:
    """Tell which samples to keep so that each is there once, given a key of each.

    One that is far more common than others, such as silence or a black frame, keeps its share: it is spread over as
    many of its places. In a sequence, a sample that directly follows its like goes where that one goes: a camera that
    stands still is part of what the sequence is, and stretches that stay together show it.

    Args:
        keys: Shape ``(N,)``; equal ones are of equal samples.
        ordered: Whether the samples are a sequence.
    """
    heads = np.ones(len(keys), bool)
    if ordered:
        heads[1:] = keys[1:] != keys[:-1]
    _, which, counts = np.unique(keys[heads], return_inverse=True, return_counts=True)
    average = len(which) / max(1, len(counts))
    quota = np.where(counts > COMMON * average, np.rint(counts / average), 1).astype(np.int64)
    turn = np.empty(len(which), np.int64)  # how many like it came before
    turn[np.argsort(which, kind="stable")] = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = turn * quota[which] % counts[which] < quota[which]
    spread: npt.NDArray[np.bool_] = kept[np.cumsum(heads) - 1]
    return spread
