"""The verdict in words, as the page shows it first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guardserve.monitor import State
from guardserve.watch import RECENT, Watch, explain

Level = Literal["good", "watch", "bad", "unknown"]


@dataclass(frozen=True)
class Headline:
    """What the page says first.

    Attributes:
        level: How it looks: ``"good"``, ``"watch"``, ``"bad"`` or ``"unknown"``.
        title: A few words.
        since: When it began, in seconds since the epoch.
        detail: What is behind it, in a sentence or two.
    """

    level: Level
    title: str
    since: float
    detail: str


STATES: dict[State, tuple[Level, str, str]] = {
    "warming": ("unknown", "Serving, not judged yet", "More samples are needed before their statistics say something."),
    "blind": ("watch", "Serving, but not watched", "No layer can be judged: none has finite running statistics."),
    "ok": ("good", "Serving normally", "What enters the model looks as it should."),
    "suspect": ("good", "Serving normally", "There is a little more evidence of a shift than usual, but no alarm."),
    "recovered": ("watch", "Serving normally again", "The evidence of a shift has stayed low since."),
}


def headline(watch: Watch) -> Headline:
    """Choose what matters most."""
    verdict, monitor = watch.verdict, watch.runtime.monitor
    if watch.failure is not None:
        return Headline("bad", "Not ready", watch.since, f"The model answers no requests: {watch.failure}.")
    if watch.nonfinite_at is not None and watch.looked_at - watch.nonfinite_at < RECENT:
        outputs = ", ".join(sorted({name for origin, name in watch.runtime.nonfinite if origin == "output"}))
        detail = f"Output {outputs} held NaN or infinity in the last minutes. Such answers are withheld, as errors."
        return Headline("bad", "Outputs are not numbers", watch.nonfinite_since or watch.nonfinite_at, detail)
    if watch.failing_since is not None and watch.failing is not None:
        detail = (
            f"{watch.failing:.0%} of the last minute's requests ended with a 5xx status: the server's log says why."
        )
        return Headline("bad", "Requests are failing", watch.failing_since, detail)
    if verdict.state == "shifted":
        seen = "strongest" if verdict.evidence is None else "first seen"
        return Headline("bad", f"Shift, {seen} at {verdict.layer}", watch.since, _sentence(explain(verdict)))
    if not monitor.layers:
        detail = "The model has no BatchNorm layer that can be watched: a shift would go unnoticed."
        return Headline("watch", "Serving, but not watched", watch.started_at, detail)
    level, title, detail = STATES[verdict.state]
    if verdict.state == "recovered" and verdict.reading:
        detail = f"The shift was: {verdict.reading}."
    return Headline(level, title, watch.since, detail)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
