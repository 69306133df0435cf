"""What fusion gains, with and without the guard and the monitor on.

    python benchmarks/fusion.py [--rounds 15] [--threads 1] [--contiguous]

For each model and batch size, prints the time of a plain forward (``eval()`` and ``inference_mode()``) and the ratios
to it: fused; guarded and monitored; fused, guarded and monitored. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from guard import interleaved
from resnet import resnet18, resnet50
from torch import nn

from guardserve import EvalGuard, Monitor, fuse

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from mobilenet import MobileNetV2

MODELS: tuple[Callable[[], nn.Module], ...] = (resnet18, resnet50, MobileNetV2)
BATCHES = (1, 8)


def plain(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a forward of a model in eval mode without safeguards."""

    def forward() -> object:
        with torch.inference_mode():
            return model(images)

    return forward


def monitored(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a guarded forward with a monitor on every BatchNorm layer, which the caller keeps for good."""
    guard, monitor = EvalGuard(model, inference_mode=True), Monitor(model)
    return lambda: (guard(images), monitor)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    print(f"{'model':12} {'batch':>5} {'plain ms':>9} {'fused':>6} {'monitored':>10} {'fused, monitored':>17}")
    for build in MODELS:
        for batch in BATCHES:
            images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
            bare, watched = (build().eval().to(memory_format=layout) for _ in range(2))
            functions = [
                plain(bare, images),
                plain(fuse(bare, images), images),
                monitored(watched, images),
                monitored(fuse(bare), images),
            ]
            for function in functions:
                function()
            base, *times = interleaved(functions, options.rounds, repeat=1)
            ratios = [f"{time / base:.3f}" for time in times]
            name = build.__name__
            print(f"{name:12} {batch:5} {base * 1e3:9.1f} {ratios[0]:>6} {ratios[1]:>10} {ratios[2]:>17}", flush=True)


if __name__ == "__main__":
    main()
