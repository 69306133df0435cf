"""What EvalGuard alone costs over a hand-written ``model.eval()`` and ``torch.inference_mode()``.

    python benchmarks/guard.py [--rounds 30]

Prints the ratio of a guarded to a plain ResNet-18 forward at batch 1 (medians of interleaved rounds), and the
guard's own time on models that do nothing, from which follow its fixed cost and its cost for each module.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from resnet import resnet18
from torch import nn

from guardserve import EvalGuard


class Empty(nn.Module):
    """A model of many modules whose forward does nothing."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.ReLU() for _ in range(modules)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x


def seconds(function: Callable[[], object], repeat: int) -> float:
    """Time one call, as the mean of some."""
    started = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - started) / repeat


def interleaved(functions: list[Callable[[], object]], rounds: int, repeat: int) -> list[float]:
    """Time several functions in turn, and return the median of each."""
    times = [[seconds(function, repeat) for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)

    model = resnet18().eval()
    image = torch.randn(1, 3, 224, 224)
    guard = EvalGuard(model, inference_mode=True)
    bare = resnet18().eval()
    bare.load_state_dict(model.state_dict())

    def plain() -> torch.Tensor:
        with torch.inference_mode():
            y: torch.Tensor = bare(image)
        return y

    times = interleaved([plain, lambda: guard(image)], rounds, 3)
    print(f"ResNet-18, batch 1: guarded / plain = {times[1] / times[0]:.4f}")

    x = torch.zeros(1)
    for state in ("eval", "training"):
        own = []
        sizes = (10, 100, 1000)
        for size in sizes:
            empty = Empty(size).train(state == "training")
            guarded = EvalGuard(empty, inference_mode=True)
            own.append(interleaved([lambda g=guarded: g(x)], rounds, 100)[0] * 1e6)
        each = (own[-1] - own[0]) / (sizes[-1] - sizes[0])
        print(f"model in {state} mode: {own[0] - each * sizes[0]:.1f} us + {each:.3f} us a module  (at {sizes}: {own})")


if __name__ == "__main__":
    main()
