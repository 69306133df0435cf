"""The demo: the embedded model behind the real server, clean and then shifted requests, and what the monitor says.

Everything that is shown is read over HTTP: predictions from the inference endpoint, alarms from ``/metrics``, and
what is behind them from the page.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from guardserve.demo.digits import SHIFTS, DigitSet, load_digits
from guardserve.exceptions import GuardserveError
from guardserve.loading import load_model
from guardserve.monitor import ReferenceProfile
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background

if TYPE_CHECKING:
    import httpx

    from guardserve.client import Client

CLEAN, SHIFT = "clean", "brighter"
IMAGES = 256
"""Images of each phase, each a request of its own."""

TARGET_ARL = 4_000
"""Images between false alarms: what a reference of 451 images can carry."""

READY_TIMEOUT = 60.0


@dataclass
class Phase:
    """What one phase of the traffic gave.

    Attributes:
        name: What the images were like.
        samples: Images sent and answered.
        correct: Images whose digit was recognised.
        finite: Whether every output was finite.
        evidence: Evidence of a shift after the last image; from 1 on, it is an alarm.
        alarm_after: Images until the alarm, None if there was none.
    """

    name: str
    samples: int = 0
    correct: int = 0
    finite: bool = True
    evidence: float = 0.0
    alarm_after: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of the images that were recognised."""
        return self.correct / max(1, self.samples)


def run_demo(host: str, port: int, *, once: bool, console: Console) -> bool:
    """Serve the embedded model, send clean and then shifted traffic, and show what happens.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        once: Stop after the traffic rather than serve on until Ctrl-C.
        console: Where to show it.

    Returns:
        Whether the demo showed what it promises: no alarm on clean traffic, one on shifted traffic.

    Raises:
        MissingExtraError: If scikit-learn, which brings the digits, is not installed.
    """
    import httpx  # noqa: PLC0415 - with all that it brings it takes memory, which servers do without

    from guardserve.client import Client  # noqa: PLC0415 - as above

    digits = load_digits()
    loaded = load_model("demo")
    console.print(f"A reference profile is made of {len(digits.reference.labels)} clean images.\n")
    profile = ReferenceProfile.fit(loaded.module, [digits.reference.images], target_arl=TARGET_ARL)
    runtime = Runtime(loaded, reference=profile, target_arl=TARGET_ARL)
    app = create_app(runtime)
    with (
        serve_in_background(app, host, port) as address,
        Client(address, runtime.name) as model,
        httpx.Client(base_url=address, trust_env=False) as pages,
    ):
        _await_ready(pages)
        console.print(f"[bold]guardserve[/bold] serves [bold]{runtime.name}[/bold], a CNN for handwritten digits,")
        console.print("which its factory left in training mode; the guard runs it in eval mode.")
        console.print(f"  page     {address}/ui\n  metrics  {address}/metrics\n  docs     {address}/docs\n")
        phases = [Phase(CLEAN), Phase(SHIFT)]
        with Live(console=console, auto_refresh=False) as view:
            for phase in phases:
                for _ in _send(model, pages, digits.live, phase):
                    view.update(_table(phases), refresh=True)
        clean, shifted = phases
        console.print("\n" + _summary(clean, shifted, _reason(pages)), soft_wrap=True)
        if not once:
            console.print("\nServing on; Ctrl-C stops.")
            _wait()
    return clean.alarm_after is None and shifted.alarm_after is not None


def _send(model: Client, pages: httpx.Client, digits: DigitSet, phase: Phase) -> Iterator[None]:
    """Send one phase's requests, yielding after each."""
    images = digits.images if phase.name == CLEAN else SHIFTS[phase.name](digits.images)
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    for row in order.narrow(0, 0, IMAGES).unsqueeze(1):
        (logits,) = model.infer({"image": images[row]}).values()
        phase.samples += 1
        phase.correct += int(logits.argmax() == digits.labels[row])
        phase.finite &= bool(np.isfinite(logits).all())
        metrics = _metrics(pages)
        phase.evidence = metrics["guardserve_shift_evidence"]
        if phase.alarm_after is None and metrics["guardserve_shift_alarms_total"]:
            phase.alarm_after = phase.samples
        yield


def _metrics(client: httpx.Client) -> dict[str, float]:
    """Read what Prometheus would of the shift; of several series with one name, the last."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    series = (line.rsplit(" ", 1) for line in lines if line.startswith("guardserve_shift_"))
    return {name.partition("{")[0]: float(value) for name, value in series}


def _reason(client: httpx.Client) -> str:
    """Read what the page says of the shift."""
    headline = client.get("/ui/state").raise_for_status().json()["now"]["headline"]
    return f"{headline['title']}: {headline['detail']}"


def _await_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while (answer := client.get("/v2/health/ready")).status_code != HTTPStatus.OK:
        if time.monotonic() > deadline:
            raise GuardserveError(f"the server was not ready within {READY_TIMEOUT:.0f} s: {answer.text}")
        time.sleep(0.05)


def _wait() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


def _table(phases: list[Phase]) -> Table:
    table = Table()
    for header in ("traffic", "images", "accuracy", "outputs", "evidence", "monitor"):
        table.add_column(header, no_wrap=True)
    for phase in phases:
        if not phase.samples:
            continue
        alarm = phase.alarm_after
        says = "[green]ok[/green]" if alarm is None else f"[bold red]SHIFT[/bold red] after {alarm}"
        table.add_row(
            phase.name,
            str(phase.samples),
            f"{phase.accuracy:.3f}",
            "finite" if phase.finite else "NON-FINITE",
            f"{phase.evidence:.2f}",
            says,
        )
    return table


def _summary(clean: Phase, shifted: Phase, reason: str) -> str:
    fell = f"Accuracy fell from {clean.accuracy:.3f} to {shifted.accuracy:.3f}"
    quiet = "while every output stayed finite and every status 200" if shifted.finite else "with non-finite outputs"
    if shifted.alarm_after is None:
        return f"{fell} {quiet}; the monitor did not notice."
    return f"{fell} {quiet};\nthe monitor said so {shifted.alarm_after} images after the shift began.\n{reason}"
