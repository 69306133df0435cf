"""What the page shows, as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from guardserve import __version__
from guardserve.monitor import Verdict
from guardserve.page.headline import headline
from guardserve.watch import LOOK_INTERVAL, Memory, Point, Watch

RULE_OF_THUMB = (
    "No reference profile: shifts are judged by a rule of thumb. Make one with guardserve reference, and serve with "
    "--reference, for alarms with a known rate of false ones."
)


def whole(watch: Watch) -> dict[str, Any]:
    """Return everything but the channels: what a page that has just been opened needs."""
    runtime = watch.runtime
    return {
        "model": runtime.name,
        "version": __version__,
        "device": str(runtime.device),
        "interval": LOOK_INTERVAL,
        "layers": list(runtime.monitor.layers),
        "unobserved": runtime.monitor.unobserved,
        "memories": [_memory(memory, runtime.monitor.layers) for memory in watch.memories],
        "findings": [dataclasses.asdict(finding) for finding in runtime.findings],
        "now": now(watch),
    }


def now(watch: Watch) -> dict[str, Any]:
    """Return the state of the last look: what is sent after each."""
    verdict, layers = watch.verdict, watch.runtime.monitor.layers
    return {
        "at": watch.looked_at,
        "headline": dataclasses.asdict(headline(watch)),
        "state": verdict.state,
        "samples": verdict.samples,
        "note": "" if verdict.evidence_threshold is not None or not layers else RULE_OF_THUMB,
        "layer": verdict.layer,
        "moved": [dataclasses.asdict(channel) for channel in verdict.channels],
        "judged_by": _judged_by(verdict),
        "guard": _guard(watch.runtime.guard.counts),
        "events": [dataclasses.asdict(event) for event in watch.events][::-1],
        "points": [_point(memory.points[-1], layers) if memory.points else None for memory in watch.memories],
    }


def channels(verdict: Verdict, name: str) -> list[dict[str, float]] | None:
    """Return how a layer's channels moved from their running statistics; None for a layer that has seen nothing."""
    layer = next((layer for layer in verdict.window.layers if layer.name == name), None)
    if layer is None:
        return None
    return [
        {
            "channel": channel.channel,
            "mean": channel.mean_shift,
            "spread": math.exp(channel.log_std_ratio),
            "distance": channel.wasserstein2,
        }
        for channel in layer.worst_channels
    ]


def _judged_by(verdict: Verdict) -> dict[str, Any]:
    if verdict.evidence_threshold is not None:
        return {"name": "evidence", "value": verdict.evidence, "threshold": verdict.evidence_threshold}
    return {"name": "shift score", "value": verdict.score, "threshold": verdict.threshold}


def _guard(counts: Mapping[str, int]) -> dict[str, int]:
    """Return what the guard had to step in for, without what never happened."""
    return {kind: count for kind, count in counts.items() if count and kind != "calls"}


def _memory(memory: Memory, layers: Sequence[str]) -> dict[str, Any]:
    return {"interval": memory.interval, "points": [_point(point, layers) for point in memory.points.copy()]}


def _point(point: Point, layers: Sequence[str]) -> dict[str, Any]:
    known = [point.layers.get(layer) for layer in layers]
    return {
        "at": round(point.at, 1),
        "level": _rounded(point.level),
        "layers": [_rounded(value) for value in known],
        "requests": _rounded(point.requests),
        "failed": _rounded(point.failed),
        "p50": point.p50,
        "p99": point.p99,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)
