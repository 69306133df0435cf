"""What monitoring every request and every BatchNorm layer costs, as ratios to a plain forward.

    python benchmarks/overhead.py [--models resnet18,mlp] [--rounds 21] [--threads 1] [--device cuda] [--no-compile]
    python benchmarks/overhead.py --memory

Prints, for each model and batch size, the time of a plain forward (``eval()`` and ``inference_mode()``, in the memory
format in which it is fastest) and the ratios to it of: a hook of a few lines that takes ``torch.var_mean`` of each
BatchNorm layer's input; the model guarded and monitored; fused, guarded and monitored; compiled and fused; compiled,
fused, guarded and monitored; and the ratio of the last two. Medians of the ratios within each of the interleaved
rounds, each in an order of its own. All models that are not fused share their weights: where copies lie in memory
makes them differ by some percent. With ``--device cuda``, times are those between CUDA events, under autocast and
channels_last.

With ``--memory`` it prints peak memory instead: the largest resident set that a process ever had which imported all of
this, built the model and ran it for some seconds, guarded and monitored or neither; the least of three processes each.
"""

from __future__ import annotations

import argparse
import copy
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from resnet import resnet18, resnet50
from torch import nn

from guardserve import EvalGuard, Monitor, fuse

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from mobilenet import MobileNetV2

Forward = Callable[[], object]


def mlp() -> nn.Sequential:
    """Build four layers of 1,024 units, each with BatchNorm and ReLU."""
    layers = [[nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU()] for _ in range(4)]
    return nn.Sequential(*[module for layer in layers for module in layer])


IMAGE = (3, 224, 224)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": (resnet18, IMAGE, (1,)),
    "resnet50": (resnet50, IMAGE, (1, 8)),
    "mobilenetv2": (MobileNetV2, IMAGE, (1, 8)),
    "mlp": (mlp, (1024,), (1, 8, 64)),
}
CUDA_MODELS = {"resnet50": (resnet50, IMAGE, (1, 32, 128))}
COLUMNS = ("naive", "eager, monitored", "fused, monitored", "compiled fused", "+ monitored", "of compiled fused")


def plain(model: nn.Module, x: torch.Tensor) -> Forward:
    """Return a forward without safeguards."""

    def forward() -> object:
        with torch.inference_mode():
            return model(x)

    return forward


def naive(model: nn.Module, x: torch.Tensor) -> Forward:
    """Return a forward with the hook that one would write first."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        if args[0].ndim == 2:  # noqa: PLR2004
            kept.append((args[0].clone(), torch.zeros(())))
        else:
            kept.append(torch.var_mean(args[0].float(), tuple(range(2, args[0].ndim))))

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(hook)
    forward = plain(model, x)

    def run() -> object:
        kept.clear()
        return forward()

    return run


def monitored(model: nn.Module, x: torch.Tensor, *, compiled: bool = False) -> Forward:
    """Return a guarded forward with a monitor on every BatchNorm layer, which the caller keeps for good."""
    monitor = Monitor(model)
    served: nn.Module = torch.compile(model, fullgraph=True) if compiled else model
    guard = EvalGuard(served, inference_mode=True)
    return lambda: (guard(x), monitor)


def twin(model: nn.Module) -> nn.Module:
    """Copy a model's modules, but not its tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def one_round(forwards: list[Forward], repeat: int, device: str) -> list[float]:
    """Time each forward once, in random order; return the times in the order given."""
    order = random.sample(range(len(forwards)), len(forwards))
    times = {i: seconds(forwards[i], repeat, device) for i in order}
    return [times[i] for i in range(len(forwards))]


def seconds(forward: Forward, repeat: int, device: str) -> float:
    """Time one forward, as the mean of some."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeat):
            forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat
    started = time.perf_counter()
    for _ in range(repeat):
        forward()
    return (time.perf_counter() - started) / repeat


def fastest_layout(model: nn.Module, x: torch.Tensor) -> torch.memory_format:
    """Return the memory format in which a plain forward is fastest."""
    layouts = [torch.channels_last, torch.contiguous_format]
    if x.ndim != 4:  # noqa: PLR2004
        return torch.contiguous_format
    forwards = [plain(copy.deepcopy(model).to(memory_format=m), x.contiguous(memory_format=m)) for m in layouts]
    times = [[seconds(forward, 1, "cpu") for forward in forwards] for _ in range(6)]
    return min(zip(map(min, zip(*times, strict=True)), layouts, strict=True), key=lambda pair: pair[0])[1]


def measure(
    build: Callable[[], nn.Module], size: tuple[int, ...], batch: int, options: argparse.Namespace
) -> tuple[float, list[float]]:
    """Return the median time of a plain forward, and the medians of the ratios to it."""
    model, x = build().eval().to(options.device), torch.randn(batch, *size, device=options.device)
    layout = torch.channels_last if options.device == "cuda" else fastest_layout(model, x)
    if len(size) > 1:
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    forwards = [
        plain(model, x),
        naive(twin(model), x),
        monitored(twin(model), x),
        monitored(fuse(model), x),
    ]
    if not options.no_compile:
        forwards += [
            plain(torch.compile(fuse(model), fullgraph=True), x),
            monitored(fuse(model), x, compiled=True),
        ]
    autocast: AbstractContextManager[object] = torch.autocast("cuda") if options.device == "cuda" else nullcontext()
    with autocast:
        for _ in range(3):
            repeat = max(1, min(50, round(options.least / max(1e-6, min(seconds(f, 1, "cpu") for f in forwards)))))
        rounds = [one_round(forwards, repeat, options.device) for _ in range(options.rounds)]
    ratios = [statistics.median(times[i] / times[0] for times in rounds) for i in range(1, len(forwards))]
    if not options.no_compile:
        ratios.append(statistics.median(times[-1] / times[-2] for times in rounds))
    return statistics.median(times[0] for times in rounds), ratios


def run_for_peak(name: str, batch: int, kind: str) -> None:
    """Run a model for some seconds, and print the peak of this process' resident set in megabytes."""
    build, size, _ = MODELS[name]
    model, x = build().eval(), torch.randn(batch, *size)
    if len(size) > 1:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    forward = plain(model, x) if kind == "plain" else monitored(model, x)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        forward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def print_memory(name: str, batch: int, threads: int) -> None:
    """Print the peaks of processes that run a model plain and monitored."""
    command = [sys.executable, __file__, "--models", name, "--batch", str(batch), "--threads", str(threads), "--peak"]
    peaks = {
        kind: min(float(subprocess.check_output([*command, kind])) for _ in range(3))  # noqa: S603 - our own file
        for kind in ("plain", "monitored")
    }
    ratio = peaks["monitored"] / peaks["plain"]
    print(f"{name:12} {batch:5} {peaks['plain']:9.1f} {peaks['monitored']:12.1f} {ratio:6.3f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--batch", type=int, action="append", help="instead of those of the table")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled columns")
    parser.add_argument("--least", type=float, default=0.02, help="seconds that a timing lasts at least, about")
    parser.add_argument("--memory", action="store_true", help="print peak memory instead")
    parser.add_argument("--peak", choices=["plain", "monitored"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        run_for_peak(options.models, options.batch[0], options.peak)
        return
    table = MODELS if options.device == "cpu" else CUDA_MODELS
    columns = COLUMNS[:3] if options.no_compile else COLUMNS
    if options.memory:
        print(f"{'model':12} {'batch':>5} {'plain MB':>9} {'monitored MB':>12}  ratio")
    else:
        print(f"{'model':12} {'batch':>5} {'plain ms':>9}  {'  '.join(columns)}")
    for name in options.models.split(",") if options.models else table:
        build, size, batches = table[name]
        for batch in options.batch or batches:
            if options.memory:
                print_memory(name, batch, options.threads)
                continue
            torch._dynamo.reset()  # noqa: SLF001 - each batch size gets a graph of its own
            base, ratios = measure(build, size, batch, options)
            shown = "  ".join(f"{ratio:{len(column)}.3f}" for ratio, column in zip(ratios, columns, strict=True))
            print(f"{name:12} {batch:5} {base * 1e3:9.2f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
