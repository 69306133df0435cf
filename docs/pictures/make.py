"""Make the pictures of the page and of the dashboard from a real served model, watched by a real Prometheus.

    make docs-pictures      needs Debian's prometheus and chromium

A few minutes of clean digits and then brighter ones pass through the demo model. The page is photographed in Chromium;
the dashboard's panels are drawn by matplotlib from what Prometheus answers to their own queries.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from playwright.sync_api import sync_playwright

from guardserve import ReferenceProfile
from guardserve.demo.digits import SHIFTS, load_digits
from guardserve.loading import load_model

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "pictures"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "guardserve.json"
RULES = ROOT / "docker" / "prometheus" / "rules.yml"

CLEAN, SHIFTED = 100, 40
"""Seconds of each kind of traffic."""

TARGET = 9000
"""Samples between false alarms: more than the clean ones, and as many as the profile carries."""

STEP = 2
"""Seconds between two points of a panel."""

READY = 60.0
"""Seconds that a program may take to start."""


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(*command: str) -> Iterator[None]:
    """Run a program until the block ends."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603 - the programs are named below
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str) -> None:
    """Wait until an address answers 200."""
    deadline = time.monotonic() + READY
    while not _answers(url):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} does not answer")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def send(url: str, seconds: float, shift: str | None = None) -> None:
    """Send images for a while, some eight requests a second."""
    images = load_digits().live.images
    images = images if shift is None else SHIFTS[shift](images)
    end, i = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        batch = images[torch.arange(i, i + 1 + i % 8) % len(images)]
        tensor = {"name": "image", "shape": list(batch.shape), "datatype": "FP32", "data": batch.flatten().tolist()}
        httpx.post(f"{url}/v2/models/digits_cnn/infer", json={"inputs": [tensor]}, trust_env=False).raise_for_status()
        i += len(batch)
        time.sleep(0.1)


def photograph(url: str, path: Path) -> None:
    """Save what the page shows."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"{url}/ui")
        page.wait_for_selector("#title:not(:has-text('Connecting'))")
        page.wait_for_timeout(3000)
        page.screenshot(path=path, full_page=True)
        browser.close()


def ask(prometheus: str, panel: dict[str, Any], target: dict[str, Any], end: float) -> list[tuple[str, Any, Any]]:
    """Run a panel's query over the time of the traffic; return each series with its legend."""
    query = re.sub(r"\$(model|instance)", ".+", target["expr"])
    query = re.sub(r"\$__(rate_interval|range)", "30s", query)
    parameters: dict[str, Any] = {"query": query, "start": end - CLEAN - SHIFTED, "end": end, "step": STEP}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=parameters, trust_env=False)
    answer.raise_for_status()
    found = []
    for series in answer.json()["data"]["result"]:
        legend = target.get("legendFormat", "") or ", ".join(
            value for label, value in series["metric"].items() if label not in ("__name__", "job", "instance")
        )
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            legend = legend.replace(f"{{{{{label}}}}}", series["metric"].get(label, ""))
        times, values = np.array([[float(at), float(value)] for at, value in series["values"]]).T
        found.append((legend or panel["title"], times - end, values))
    return found


def draw(axes: Axes, panel: dict[str, Any], series: list[tuple[str, Any, Any]]) -> None:
    """Draw one panel."""
    axes.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=7)
    if not series:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="grey")
        axes.set_axis_off()
    elif panel["type"] == "heatmap":
        _heat(axes, series, panel["options"]["color"].get("max"))
    elif panel["type"] in ("stat", "table"):
        lines = [
            legend if panel["type"] == "table" else f"{legend}  {_short(values[-1])}" for legend, _, values in series
        ]
        axes.text(0.5, 0.5, "\n".join(lines[:4]), ha="center", va="center", fontsize=10)
        axes.set_axis_off()
    elif panel["type"] == "bargauge":
        series = sorted(series, key=lambda item: item[2][-1])[-10:]
        axes.barh([legend for legend, _, _ in series], [values[-1] for _, _, values in series], color="#c4462f")
    else:
        for legend, times, values in series[:8]:
            axes.plot(times, values, lw=1.2, label=legend, ls="--" if "threshold" in legend else "-")
        axes.legend(fontsize=6, frameon=False, loc="upper left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)


def _heat(axes: Axes, series: list[tuple[str, Any, Any]], hottest: float | None) -> None:
    bounds = all(re.fullmatch(r"[\d.]+|\+Inf", legend) for legend, _, _ in series)
    if bounds:  # a histogram: its buckets count what is below them too
        series = sorted(series, key=lambda item: float(item[0]))
    times = np.arange(-CLEAN - SHIFTED, STEP, STEP)
    grid = np.full((len(series), len(times)), np.nan)
    for row, (_, at, values) in enumerate(series):
        grid[row, np.clip(np.round((at - times[0]) / STEP).astype(int), 0, len(times) - 1)] = values
    if bounds:
        grid[1:] -= grid[:-1].copy()
    shown = axes.imshow(grid, aspect="auto", extent=(times[0], 0, len(series), 0), cmap="Oranges", vmin=0, vmax=hottest)
    axes.set_yticks(np.arange(len(series)) + 0.5, [legend for legend, _, _ in series])
    axes.figure.colorbar(shown, ax=axes, pad=0.01).ax.tick_params(labelsize=6)


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def picture(prometheus: str, path: Path, end: float) -> None:
    """Draw every panel where the dashboard has it."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(16, height * 0.32))
    for panel in panels:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        left = {"heatmap": 1.6, "bargauge": 3.2}.get(panel["type"], 0.6)  # for the names of rows, in grid columns
        box = (x + left, height - y - h + 0.7, w - left - 0.3, h - 1.6)
        axes = figure.add_axes((box[0] / 24, box[1] / height, box[2] / 24, max(0.1, box[3]) / height))
        if panel["type"] == "row":
            axes.set_axis_off()
            axes.text(0, 0.5, panel["title"], fontsize=12, fontweight="bold", va="center")
            continue
        draw(axes, panel, [series for target in panel["targets"] for series in ask(prometheus, panel, target, end)])
    figure.savefig(path, dpi=80)


def main() -> None:
    """Make both pictures."""
    mpl.use("Agg")
    guardserve, url = Path(sys.executable).with_name("guardserve"), f"http://127.0.0.1:{free_port()}"
    prometheus = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        profile = Path(folder) / "profile.safetensors"
        ReferenceProfile.fit(load_model("demo").module, [load_digits().train.images], target_arl=TARGET).save(profile)
        settings = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        del settings["alerting"]
        settings["rule_files"] = [str(RULES)]
        (Path(folder) / "prometheus.yml").write_text(yaml.safe_dump(settings))
        port = url.rpartition(":")[2]
        options = ("--reference", str(profile), "--target-arl", str(TARGET), "--port", port)
        stack.enter_context(running(str(guardserve), "serve", "demo", *options))
        stack.enter_context(
            running(
                shutil.which("prometheus") or "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={prometheus.removeprefix('http://')}",
            )
        )
        wait_for(f"{url}/v2/health/ready")
        wait_for(f"{prometheus}/-/ready")
        send(url, CLEAN)
        photograph(url, OUT / "page-normal.png")
        send(url, SHIFTED, "brighter")
        end = time.time()
        photograph(url, OUT / "page-shift.png")
        picture(prometheus, OUT / "dashboard.png", end)


if __name__ == "__main__":
    main()
