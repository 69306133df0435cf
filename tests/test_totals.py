"""What the versions of a model count together."""

from __future__ import annotations

from itertools import pairwise

import torch
from serving import loaded
from torch import nn

from guardserve.runtime import Runtime
from guardserve.totals import Totals, Version

Counted = dict[str, dict[tuple[str, ...], float]]


def started(*layers: nn.Module) -> Runtime:
    """Start a runtime."""
    runtime = Runtime(loaded(nn.Sequential(*layers)))
    runtime.start()
    return runtime


def test_no_count_goes_back_or_goes_away_when_versions_follow_and_leave() -> None:
    """Not that of a layer that the new version lacks either; while both run they count together."""
    first, second = started(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), started(nn.BatchNorm1d(3))
    try:
        totals = Totals(first)
        seen: list[Counted] = []

        def read() -> None:
            totals.look()
            seen.append(totals.read())

        first.infer({"x": torch.ones(5, 3)})
        first.nonfinite["input", "x"] += 2
        read()
        totals.follow(Version(second))
        read()
        first.infer({"x": torch.ones(2, 3)})
        second.infer({"x": torch.ones(1, 3)})
        read()
        first.close()
        totals.leave(first)
        read()
        second.infer({"x": torch.ones(1, 3)})
        read()
    finally:
        second.close()
    assert [counts["guardserve_samples_total"]["net",] for counts in seen] == [5, 5, 8, 8, 9]
    for before, after in pairwise(seen):
        for name, series in before.items():
            for labels, count in series.items():
                assert after[name][labels] >= count
    last = seen[-1]["guardserve_nonfinite_samples_total"]
    assert last["net", "input", "x"] == 2
    assert ("net", "activation", "1") in last
    assert totals.versions == (Version(second),)
