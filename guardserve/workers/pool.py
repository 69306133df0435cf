"""What a supervisor makes of its workers' reports: one exposition, one window, one detector."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector

from guardserve.exceptions import ReferenceProfileError
from guardserve.metrics import refusal_families, worker_families
from guardserve.monitor import Detection, Detector, ReferenceProfile, Seen, Summary, load_state, save_state
from guardserve.workers.families import Families, counted, merge, replaced
from guardserve.workers.messages import Report

_log = logging.getLogger(__name__)

REQUESTS = "guardserve_requests"

SAVE_FAILURES = "guardserve_state_save_failures"


class Pool:
    """Adds up what workers report, those that have ended included.

    Args:
        window: Samples in the recent window of all workers together.
        reference: File of the profile of what clean data look like; a detector then judges all workers' samples,
            interval by interval, as one would that saw them all. It is read again when workers have another.
        target_arl: With a reference, samples between false alarms, on average.
        state: File that the detector's memory is loaded from, if it is there, and saved to.

    Raises:
        DetectorStateError: If the state is damaged, or of a detector with another profile.
    """

    def __init__(
        self,
        *,
        window: int = 256,
        reference: Path | None = None,
        target_arl: float = 10_000,
        state: Path | None = None,
    ) -> None:
        self._window = window
        self._reference = reference
        self._target_arl = target_arl
        self._detector = None if reference is None else Detector(ReferenceProfile.load(reference), target_arl)
        self._last: Detector | None = None
        self._alarms = 0
        self._state = state
        self._retained: Families = []
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        self._failures = 0
        if self._detector is not None and state is not None:
            load_state(state, self._detector)

    @property
    def detection(self) -> Detection | None:
        """What the detector makes of all samples so far, with the alarms of those before; None without a reference."""
        if self._detector is None:
            return None
        detection = self._detector.detection()
        before = 0 if self._last is None else self._last.detection().alarms
        return replace(detection, alarms=self._alarms + before + detection.alarms)

    def retain(self, report: Report) -> None:
        """Keep what a worker that has ended had counted."""
        self._retained = merge([self._retained, counted(report.families)])

    def judge(self, reports: Iterable[Report]) -> None:
        """Show the detector what workers have seen since they last reported."""
        summaries: dict[str, list[Summary]] = {}
        for report in reports:
            for summary in report.summaries:
                summaries.setdefault(summary.digest, []).append(summary)
        for digest, (first, *others) in summaries.items():
            detector = self._judging_by(digest)
            summary = first.merge(*others)
            if detector is None:
                _log.warning("%d samples go unjudged: their profile is not there any more", summary.samples.sum())
            else:
                detector.judge_summary(summary)

    def families(self, reports: Iterable[Report], states: Mapping[str, int], restarts: int, refused: int) -> Families:
        """Make one exposition of reports, of what was retained, and of this process.

        Args:
            reports: The last one of each worker.
            states: How many workers are in each of :data:`guardserve.metrics.WORKER_STATES`.
            restarts: Workers that were started again so far.
            refused: Inference requests that were refused while no worker took any.
        """
        pooled = merge([self._retained, list(self._own.collect()), *(report.families for report in reports)])
        served = {one.labels["model"] for family in pooled if family.name == REQUESTS for one in family.samples}
        pooled = merge([pooled, *(list(refusal_families(model, refused)) for model in served)])
        for family in pooled:
            if family.name == SAVE_FAILURES:
                family.samples = [one._replace(value=one.value + self._failures) for one in family.samples]
        return replaced(pooled, list(worker_families(states, restarts)))

    def since(self, reports: Iterable[Report]) -> float:
        """Return when the recent window of all workers together begins, by the parts of theirs that they told."""
        samples = 0
        for ended, part in sorted((part for report in reports for part in report.window), reverse=True):
            samples += part
            if samples >= self._window:
                return ended
        return 0.0

    def seen(self, reports: Iterable[Report], version: str) -> Seen:
        """Return what the windows of the workers that serve a version of the model show together."""
        seen = Seen()
        for report in reports:
            if report.version == version:
                seen.merge(report.seen)
        return seen

    def _judging_by(self, digest: str) -> Detector | None:
        """Return the detector of a profile; a new one is read, None if it is not there.

        That of the profile before is kept, as what workers had seen with it may come late, or they go back to it.
        """
        last = self._last if self._last is not None and self._last.profile.digest == digest else None
        if self._detector is None or self._detector.profile.digest == digest or self._reference is None:
            return self._detector or last
        try:
            profile = ReferenceProfile.load(self._reference)
        except ReferenceProfileError as error:
            _log.error("the profile that workers have loaded cannot be read: %s", error)
            return last
        if profile.digest != digest:
            return last
        if last is not None:
            self._last, self._detector = self._detector, last
            return last
        self._alarms += 0 if self._last is None else self._last.detection().alarms
        self._last, self._detector = self._detector, Detector(profile, self._target_arl)
        return self._detector

    def save(self) -> None:
        """Write what the detector remembers, if there is a file for it; what cannot be written is logged."""
        if self._detector is None or self._state is None:
            return
        try:
            save_state(self._state, self._detector)
        except Exception as error:  # noqa: BLE001 - the workers go on
            self._failures += 1
            _log.error("the detector's state could not be saved to %s, which is tried again: %s", self._state, error)
