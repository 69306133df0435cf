"""The demo: the embedded model behind the real server, clean and then shifted requests, and what the monitor says.

Everything that is shown is read over HTTP: predictions from the inference endpoint, the shift from ``/metrics``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from guardserve.demo.digits import SHIFTS, DigitSet, load_digits
from guardserve.exceptions import GuardserveError
from guardserve.loading import load_model
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background

if TYPE_CHECKING:
    import httpx

CLEAN, SHIFT = "clean", "brighter"
BATCH = 8
REQUESTS = 32
"""Requests of each phase."""

WINDOW = 64
THRESHOLD = 0.3
"""Over 1,000 clean windows of this size the score stayed below .24; a window of the demo's shift has over .7."""

READY_TIMEOUT = 60.0


@dataclass
class Phase:
    """What one phase of the traffic gave.

    Attributes:
        name: What the images were like.
        samples: Images sent and answered.
        correct: Images whose digit was recognised.
        finite: Whether every output was finite.
        score: The shift score after the last request, None while the monitor had too few samples.
        alarm_after: Images until the score reached the threshold, None if it did not.
    """

    name: str
    samples: int = 0
    correct: int = 0
    finite: bool = True
    score: float | None = None
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

    live = load_digits().live
    runtime = Runtime(load_model("demo"), shift_window=WINDOW, shift_min_samples=WINDOW, shift_threshold=THRESHOLD)
    app = create_app(runtime)
    with serve_in_background(app, host, port) as address, httpx.Client(base_url=address, trust_env=False) as client:
        _await_ready(client)
        console.print(f"[bold]guardserve[/bold] serves [bold]{runtime.name}[/bold], a CNN for handwritten digits,")
        console.print("which its factory left in training mode; the guard runs it in eval mode.")
        console.print(f"  page     {address}/ui\n  metrics  {address}/metrics\n  docs     {address}/docs\n")
        phases = [Phase(CLEAN), Phase(SHIFT)]
        with Live(console=console, auto_refresh=False) as view:
            for phase in phases:
                for _ in _send(client, runtime.name, live, phase):
                    view.update(_table(phases), refresh=True)
        clean, shifted = phases
        console.print("\n" + _summary(clean, shifted), soft_wrap=True)
        if not once:
            console.print("\nServing on; Ctrl-C stops.")
            _wait()
    return clean.alarm_after is None and shifted.alarm_after is not None


def _send(client: httpx.Client, model: str, digits: DigitSet, phase: Phase) -> Iterator[None]:
    """Send one phase's requests, yielding after each."""
    images = digits.images if phase.name == CLEAN else SHIFTS[phase.name](digits.images)
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    for start in range(0, BATCH * REQUESTS, BATCH):
        rows = order.narrow(0, start, BATCH)
        logits = _infer(client, model, images[rows])
        phase.samples += len(rows)
        phase.correct += int((logits.argmax(1) == digits.labels[rows]).sum())
        phase.finite &= bool(logits.isfinite().all())
        phase.score = _score(client)
        if phase.alarm_after is None and phase.score is not None and phase.score >= THRESHOLD:
            phase.alarm_after = phase.samples
        yield


def _infer(client: httpx.Client, model: str, images: torch.Tensor) -> torch.Tensor:
    """Send images in the protocol's binary form; return the logits, shape ``(N, 10)``."""
    tensor = images.contiguous().numpy().astype("<f4").tobytes()
    entry = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(tensor)},
    }
    header = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
    answer = client.post(f"/v2/models/{model}/infer", content=header + tensor, headers=headers).raise_for_status()
    (output,) = answer.json()["outputs"]
    return torch.tensor(output["data"]).reshape(output["shape"])


def _score(client: httpx.Client) -> float | None:
    """Read the shift score as Prometheus would."""
    for line in client.get("/metrics").raise_for_status().text.splitlines():
        if line.startswith("guardserve_shift_score{"):
            return float(line.rsplit(" ", 1)[1])
    return None


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
    for header in ("traffic", "images", "accuracy", "outputs", "shift score", "monitor"):
        table.add_column(header, no_wrap=True)
    for phase in phases:
        if not phase.samples:
            continue
        if phase.alarm_after is not None:
            says = f"[bold red]SHIFT[/bold red] after {phase.alarm_after}"
        else:
            says = "warming" if phase.score is None else "[green]ok[/green]"
        table.add_row(
            phase.name,
            str(phase.samples),
            f"{phase.accuracy:.3f}",
            "finite" if phase.finite else "NON-FINITE",
            "-" if phase.score is None else f"{phase.score:.2f}",
            says,
        )
    return table


def _summary(clean: Phase, shifted: Phase) -> str:
    fell = f"Accuracy fell from {clean.accuracy:.3f} to {shifted.accuracy:.3f}"
    quiet = "while every output stayed finite and every status 200" if shifted.finite else "with non-finite outputs"
    if shifted.alarm_after is None:
        return f"{fell} {quiet}; the monitor did not notice."
    after = f"{shifted.alarm_after} images after the shift began (score over {THRESHOLD})"
    return f"{fell} {quiet};\nthe monitor said so {after}."
