"""One exposition made of several processes': counters and histograms add up, gauges as their rules say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from guardserve.metrics import METRICS

Families: TypeAlias = list[Metric]

ADDED = frozenset({"counter", "histogram", "summary"})
"""Kinds whose samples only grow, and so outlive the process that counted them."""

RULES: Mapping[str, Callable[[float, float], float]] = {"sum": lambda a, b: a + b, "max": max, "min": min}

PROCESS = {"process_start_time_seconds": "min"}
"""Rules of prometheus_client's own gauges; the others with this prefix are amounts, which add up."""


def rule(family: Metric) -> str:
    """Return how samples of a family that differ in nothing but their process become one.

    ``"sum"``, ``"max"`` or ``"min"``; the gauges' own are in :data:`guardserve.metrics.METRICS`.
    """
    if family.type in ADDED:
        return "sum"
    if family.name in METRICS:
        return METRICS[family.name].pooled
    return PROCESS.get(family.name, "sum" if family.name.startswith("process_") else "max")


def merge(parts: Iterable[Families]) -> Families:
    """Make one exposition of several.

    Of two exemplars the later one is kept.
    """
    families: dict[str, Metric] = {}
    samples: dict[str, dict[object, Sample]] = {}
    for part in parts:
        for family in part:
            found = samples.setdefault(family.name, {})
            if family.name not in families:
                families[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
            combine = RULES[rule(family)]
            for sample in family.samples:
                key = sample.name, *sorted(sample.labels.items())
                mine = found.get(key)
                found[key] = sample if mine is None else _joined(mine, sample, combine)
    for name, family in families.items():
        family.samples = list(samples[name].values())
    return list(families.values())


def counted(families: Families) -> Families:
    """Return what is left of a process that has ended: what it had counted."""
    return [family for family in families if family.type in ADDED]


def replaced(families: Families, others: Sequence[Metric]) -> Families:
    """Return families with others in the place of those that have their names."""
    names = {family.name for family in others}
    return [family for family in families if family.name not in names] + list(others)


def _joined(a: Sample, b: Sample, combine: Callable[[float, float], float]) -> Sample:
    exemplar = max(
        (one for one in (a.exemplar, b.exemplar) if one is not None),
        key=lambda one: one.timestamp or 0.0,
        default=None,
    )
    return a._replace(value=combine(a.value, b.value), exemplar=exemplar)
