"""How long a scrape of ``/metrics`` takes: with what the watch saw, and if it asked the monitor itself.

    python benchmarks/scrape.py [--rounds 20]

For models of so many BatchNorm layers and channels, with a full window. "asks" is a scrape that has the monitor judge
its window, as all did once; "watched" one of a served model, which shows what the watch looked at, or waits up to
25 ms for a look of its own. Both alternate; medians of the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from guardserve.loading import LoadedModel
from guardserve.metrics import OPENMETRICS, Metrics
from guardserve.runtime import Runtime
from guardserve.signature import TensorSpec
from guardserve.watch import LOOK_INTERVAL, Watch

SIZES = ((5, 64), (50, 512), (200, 2048))


def milliseconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure(layers: int, channels: int, rounds: int) -> tuple[float, float, int]:
    """Return the medians of both, and the bytes of a scrape."""
    module = nn.Sequential(*(nn.BatchNorm1d(channels) for _ in range(layers))).eval()
    spec = TensorSpec("x", torch.float32, (-1, channels))
    runtime = Runtime(LoadedModel("net", module, (spec,), "pytorch_eager", torch.device("cpu"), "a benchmark"))
    runtime.start()
    for _ in range(10):
        runtime.infer({"x": torch.randn(32, channels)})
    asking, watched = Metrics(runtime), Metrics(runtime)
    watch = Watch(runtime, watched)
    watch.start()
    time.sleep(1.5 * LOOK_INTERVAL)
    taken: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for metrics, times in zip((asking, watched), taken, strict=True):
            times.append(milliseconds(lambda metrics=metrics: metrics.render(OPENMETRICS)))  # type: ignore[misc]
    watch.close()
    runtime.close()
    return statistics.median(taken[0]), statistics.median(taken[1]), len(watched.render(OPENMETRICS))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| layers | channels | asks, ms | watched, ms | ratio | kB |\n|---|---|---|---|---|---|")
    for layers, channels in SIZES:
        asks, shows, size = measure(layers, channels, rounds)
        print(f"| {layers} | {channels} | {asks:.1f} | {shows:.1f} | {shows / asks:.2f} | {size / 1000:.0f} |")


if __name__ == "__main__":
    main()
