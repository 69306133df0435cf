"""How soon a shift is seen: median samples until the alarm, for three detectors with the same rate of false alarms.

    python benchmarks/detection.py [--arl 1000] [--streams 40] [--reference 1200]

The model is the demo's; its digits, those that it was not trained on, are moved a little each time that one is drawn,
so that clean samples never run out. All three are charts with the same weights, and get what they know of clean data
from the same reference. For the table each threshold is set on clean samples of which the detectors have seen none,
so that all have the same false-alarm rate; a second such set measures it. What guardserve alone promises, the rate at
the threshold that its profile sets from the reference, is printed below.

- guardserve: whitened sketches of every BatchNorm layer.
- unwhitened: the same features of every layer, standardised only.
- softmax: the ten class probabilities, whitened (black-box shift detection, Rabanser et al. 2019).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from guardserve.demo.digits import SHIFTS, blurred, brighter, faded, load_digits, noisy
from guardserve.demo.model import digits_cnn
from guardserve.monitor import ReferenceProfile
from guardserve.monitor.calibration import Levels, find_levels, largest_evidence
from guardserve.monitor.chart import Chart
from guardserve.monitor.encoding import Whitening, shorten
from guardserve.monitor.features import Array, FeatureReader, execution_order
from guardserve.monitor.taps import Record, Taps

CLEAN_BEFORE, LONGEST = 100, 600
POOL = 8000
"""Clean samples that set a threshold, and as many that measure it."""


class Digits:
    """An endless supply of clean digits."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.cat([digits.reference.images, digits.live.images])
        self.labels = torch.cat([digits.reference.labels, digits.live.labels])

    def draw(self, count: int, seed: int, classes: tuple[int, ...] = tuple(range(10))) -> torch.Tensor:
        """Draw images of some classes, each moved by up to half a pixel and turned and stretched a little."""
        generator = torch.Generator().manual_seed(seed)
        chosen = self.images[torch.isin(self.labels, torch.tensor(classes))]
        chosen = chosen[torch.randint(len(chosen), (count,), generator=generator)]
        move = (2 * torch.rand(count, 2, 1, generator=generator) - 1) / 8
        turn = torch.eye(2).expand(count, 2, 2) + 0.15 * (2 * torch.rand(count, 2, 2, generator=generator) - 1)
        return resampled(chosen, torch.cat([turn, move], dim=2))


def resampled(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Move images by affine maps of shape ``(N, 2, 3)``."""
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def turned(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate images."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    return resampled(images, matrix.expand(len(images), 2, 3))


def tenth(change: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Change one image in ten."""
    changed = images.clone()
    changed[::10] = change(images[::10])
    return changed


TABLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "noise .02": lambda x: noisy(x, 0.02),
    "noise .05": lambda x: noisy(x, 0.05),
    "brighter .02": lambda x: brighter(x, 0.02),
    "brighter .05": lambda x: brighter(x, 0.05),
    "contrast .9": lambda x: faded(x, 0.9),
    "blur .4": lambda x: blurred(x, 0.4),
    "blur .6": lambda x: blurred(x, 0.6),
    "turned 5": lambda x: turned(x, 5),
    "turned 20": lambda x: turned(x, 20),
    "gamma .6": lambda x: x.clamp(0, 1) ** 0.6,
    "10 % noise .3": lambda x: tenth(lambda y: noisy(y, 0.3), x),
    "10 % blur 1": lambda x: tenth(lambda y: blurred(y, 1), x),
} | {f"demo: {name}": shift for name, shift in SHIFTS.items()}


@dataclass(frozen=True)
class Seen:
    """What the model shows of samples: features of its layers, and class probabilities."""

    features: Array
    softmax: Array


def see(model: nn.Module, images: torch.Tensor) -> Seen:
    """Run the model over images."""
    records: list[Record] = []
    taps = Taps(model, records.append)
    with torch.inference_mode():
        softmax = torch.cat([model(batch).softmax(1) for batch in torch.split(images, 500)]).numpy()
    taps.close()
    order = execution_order(records[0])
    return Seen(FeatureReader([taps.points[i] for i in order], order).read(records), softmax)


@dataclass(frozen=True)
class Rival:
    """A way to turn what is seen into vectors for the charts."""

    dimensions: tuple[int, ...]
    vectors: Callable[[Seen], Array]


def rivals(profile: ReferenceProfile, reference: Seen) -> dict[str, Rival]:
    """Fit each detector to the reference."""
    channels, centre = profile.sketch.channels, reference.features.mean(0)
    spread, total = np.maximum(reference.features.std(0), 1e-3), sum(profile.sketch.channels)
    starts = np.cumsum((0, *channels))

    def unwhitened(seen: Seen) -> Array:
        z = np.clip((seen.features - centre) / spread, -8, 8)
        out = np.zeros((len(z), len(channels), 2 * max(channels)), np.float32)
        for layer, (start, count) in enumerate(zip(starts, channels, strict=False)):
            out[:, layer, :count] = z[:, start : start + count]
            out[:, layer, count : 2 * count] = z[:, total + start : total + start + count]
        return out

    softmax = Whitening.fit(reference.softmax[:, None], [10])
    return {
        "guardserve": Rival(
            profile.sketch.dimensions, lambda seen: shorten(profile.encode(seen.features)[1], profile.radius)
        ),
        "unwhitened": Rival(tuple(2 * count for count in channels), unwhitened),
        "softmax": Rival((10,), lambda seen: softmax.apply(seen.softmax[:, None])),
    }


def run_length(pool: Array, rival: Rival, levels: Levels, threshold: float, arl: float) -> float:
    """Measure the average run length on clean vectors."""
    horizon = round(arl)
    largest = evidence(pool, rival, levels, horizon)
    return -horizon / math.log1p(-((largest >= threshold).sum() + 0.5) / (len(largest) + 1))


def evidence(pool: Array, rival: Rival, levels: Levels, horizon: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the largest evidence of each of 256 clean streams."""
    rng = np.random.default_rng(1)
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = largest_evidence(
        [pool], rival.dimensions, levels, streams=256, horizons=[horizon], rng=rng
    )[0]
    return found


def delay(clean: Array, shifted: Array, rival: Rival, levels: Levels, *, threshold: float, streams: int) -> float:
    """Return the median number of shifted samples until the alarm; infinity if most streams give none."""
    rng = np.random.default_rng(2)
    chart = Chart(streams, rival.dimensions, clean.shape[2])
    for _ in range(CLEAN_BEFORE):
        chart.step(clean[rng.integers(0, len(clean), streams)])
    found = np.full(streams, math.inf)
    for step in range(1, LONGEST + 1):
        statistic = chart.step(shifted[rng.integers(0, len(shifted), streams)])
        alarmed = levels.evidence(statistic).max((1, 2)) >= threshold
        found[alarmed & np.isinf(found)] = step
    return float(np.median(found))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arl", type=float, default=1000, help="samples between false alarms")
    parser.add_argument("--streams", type=int, default=40, help="streams of each shift")
    parser.add_argument("--reference", type=int, default=1200, help="samples of the reference")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits, model = Digits(), digits_cnn().eval()
    images = digits.draw(arguments.reference, 1)
    profile = ReferenceProfile.fit(model, torch.split(images, 100), target_arl=arguments.arl)
    setting, measuring = see(model, digits.draw(POOL, 2)), see(model, digits.draw(POOL, 3))
    shifted = {name: see(model, shift(digits.draw(2000, 4))) for name, shift in TABLE.items()}
    for classes in ((1, 7), (0, 2, 4, 6, 8)):
        name = "only " + ", ".join(map(str, classes))
        shifted[name] = see(model, digits.draw(2000, 5, classes))
    fitted = rivals(profile, see(model, images))
    columns: dict[str, list[str]] = {"": ["clean: mean samples to a false alarm", *shifted]}
    for name, rival in fitted.items():
        levels = find_levels([rival.vectors(setting)], rival.dimensions, np.random.default_rng(0))
        clean, horizon = rival.vectors(measuring), round(arguments.arl)
        threshold = float(np.quantile(evidence(rival.vectors(setting), rival, levels, horizon), math.exp(-1)))
        cells = [f"{run_length(clean, rival, levels, threshold, arguments.arl):.0f}"]
        for seen in shifted.values():
            median = delay(clean, rival.vectors(seen), rival, levels, threshold=threshold, streams=arguments.streams)
            cells.append(f"{median:.0f}" if math.isfinite(median) else f"> {LONGEST}")
        columns[name] = cells
    print(f"median samples until the alarm, {arguments.streams} streams, one false alarm in {arguments.arl:.0f}\n")
    print("| | " + " | ".join(fitted) + " |\n|---|" + "---|" * len(fitted))
    for row in zip(*columns.values(), strict=True):
        print("| " + " | ".join(row) + " |")
    own = fitted["guardserve"]
    promised = run_length(own.vectors(measuring), own, profile.levels, profile.threshold(arguments.arl), arguments.arl)
    print(
        f"\nguardserve's own threshold, from {profile.samples} samples, for one in {arguments.arl:.0f}: "
        f"one in {promised:.0f} on {POOL} fresh samples; its profile says {profile.measured_arl.mean:.0f} "
        f"({profile.measured_arl.low:.0f} to {profile.measured_arl.high:.0f})"
    )


if __name__ == "__main__":
    main()
