"""What the versions of a model count, added up, so that no count goes back when one takes another's place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from guardserve.engine import FAULTS, Engine, EngineCounts
from guardserve.monitor import Monitor, Verdict
from guardserve.runtime import Runtime

Labels: TypeAlias = tuple[str, ...]
Series: TypeAlias = dict[tuple[str, Labels], float]

VIOLATIONS = ("training_on_entry", "training_during_forward", "buffers_changed", "hazards")

ALARMS = "guardserve_shift_alarms_total"

NO_ENGINE = EngineCounts(0, dict.fromkeys(FAULTS, 0), 0)


class Version(NamedTuple):
    """A version of the model, and what counts for it.

    Attributes:
        runtime: The model.
        engine: What runs its forwards, where one does.
        name: What it is called; empty where it has no name.
    """

    runtime: Runtime
    engine: Engine | None = None
    name: str = ""

    @property
    def counts(self) -> EngineCounts:
        """What its engine has done so far."""
        return NO_ENGINE if self.engine is None else self.engine.counts


class Look(NamedTuple):
    """What a monitor said when it was last asked, which takes it long if the model is wide.

    Attributes:
        verdict: What it made of what it had seen.
        samples: Samples that it had seen.
        nonfinite: Those of them with a non-finite value, by layer.
        unobservable: Channels that it leaves out.
    """

    verdict: Verdict
    samples: int
    nonfinite: Mapping[str, int]
    unobservable: int

    @classmethod
    def at(cls, monitor: Monitor) -> Look:
        """Ask it."""
        return cls(monitor.verdict(), *monitor.counts(), sum(monitor.unobservable_channels.values()))


class _State(NamedTuple):
    """What is read together.

    Attributes:
        past: Counts of the versions that have ended, by metric and labels.
        versions: Those that have not, the one that answers requests last.
    """

    past: Series
    versions: tuple[Version, ...]


class Totals:
    """Adds up what a model's versions count, for any thread.

    Args:
        runtime: The first version.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._state = _State({}, (Version(runtime),))
        self._changing = threading.Lock()
        self._looks: Mapping[Runtime, Look] = WeakKeyDictionary()

    @property
    def versions(self) -> tuple[Version, ...]:
        """The versions that count now, the one that answers requests last."""
        return self._state.versions

    def follow(self, version: Version) -> None:
        """Count a version, from now on the one that answers requests."""
        # its detector may have taken over what another had counted
        inherited: Series = {(ALARMS, (version.runtime.name,)): -version.runtime.monitor.verdict().alarms}
        with self._changing:
            past, versions = self._state
            others = tuple([other for other in versions if other.runtime is not version.runtime])
            self._state = _State(_sum(past, inherited) if len(others) == len(versions) else past, (*others, version))

    def leave(self, runtime: Runtime) -> None:
        """Count a version for the last time: it has ended."""
        (ended,) = [version for version in self.versions if version.runtime is runtime]
        counted = dict(_counted(ended, Look.at(runtime.monitor)))
        with self._changing:
            past, versions = self._state
            self._state = _State(_sum(past, counted), tuple([version for version in versions if version is not ended]))

    def look(self) -> None:
        """Ask every monitor: what is read until the next look."""
        self._looks = WeakKeyDictionary(
            {version.runtime: Look.at(version.runtime.monitor) for version in self.versions}
        )

    def seen(self, runtime: Runtime) -> Look:
        """Return what the monitor of a version said at the last look."""
        return self._looks.get(runtime) or Look.at(runtime.monitor)

    def read(self) -> dict[str, dict[Labels, float]]:
        """Return each counter with its series."""
        past, versions = self._state
        for version in versions:
            past = _sum(past, dict(_counted(version, self.seen(version.runtime))))
        found: dict[str, dict[Labels, float]] = {}
        for (name, labels), count in past.items():
            found.setdefault(name, {})[labels] = count
        return found


def _sum(left: Series, right: Series) -> Series:
    return {key: left.get(key, 0) + right.get(key, 0) for key in (left | right)}


def _counted(version: Version, look: Look) -> Iterator[tuple[tuple[str, Labels], float]]:
    """Yield what a version has counted; what can count is there from the start, at 0."""
    runtime, counts = version.runtime, version.counts
    model, monitor = runtime.name, runtime.monitor
    for kind in FAULTS:
        yield ("guardserve_faults_total", (model, kind)), counts.faults[kind]
    yield ("guardserve_recoveries_total", (model,)), counts.recoveries
    for kind in VIOLATIONS:
        yield ("guardserve_guard_violations_total", (model, kind)), runtime.guard.counts[kind]
    yield ("guardserve_samples_total", (model,)), look.samples
    for origin, specs in (("input", runtime.signature.inputs), ("output", runtime.signature.outputs)):
        for spec in specs:
            key = origin, spec.name
            yield ("guardserve_nonfinite_samples_total", (model, *key)), runtime.nonfinite[key]
    for layer in monitor.layers:
        yield ("guardserve_nonfinite_samples_total", (model, "activation", layer)), look.nonfinite.get(layer, 0)
    yield (ALARMS, (model,)), look.verdict.alarms
    failures = 0 if runtime.keeper is None else runtime.keeper.failures
    yield ("guardserve_state_save_failures_total", (model,)), failures
