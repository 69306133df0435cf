"""Draw the pictures of docs/detection.md from the demo's model and digits: python docs/pictures/detection.py.

It takes some minutes. matplotlib comes with the dependency group docs.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from detection import Digits
from detectors import see

from guardserve.demo.digits import blurred, brighter
from guardserve.demo.model import digits_cnn
from guardserve.detection.calibration import Pool, largest_evidence, mean_run_length
from guardserve.detection.detector import Detector
from guardserve.monitor import ReferenceProfile

HERE = Path(__file__).parent
SIZES = (150, 300, 600, 1000, 2000, 5000)
TARGET = 1000
PROFILES = 4
"""Profiles of each size."""
CLEAN, SHIFTED = 150, 150


def evidence(profile: ReferenceProfile, features: np.ndarray) -> tuple[list[float], Detector]:
    """Judge samples one by one and keep the evidence after each."""
    detector, seen = Detector(profile, TARGET), []
    for row in features:
        detector.judge(row[None])
        seen.append(detector.detection().evidence)
    return seen, detector


def draw_streams(profile: ReferenceProfile, digits: Digits) -> None:
    """Clean digits, then the same digits a little changed: what the charts make of them."""
    model = digits_cnn().eval()
    shifts = {
        "brighter by .05": lambda x: brighter(x, 0.05),
        "blurred by .6 pixels": lambda x: blurred(x, 0.6),
        "only the digits 1 and 7": None,
        "clean": lambda x: x,
    }
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    before = digits.draw(CLEAN, 7)
    for name, shift in shifts.items():
        after = digits.draw(SHIFTED, 8, (1, 7)) if shift is None else shift(digits.draw(SHIFTED, 8))
        seen, detector = evidence(profile, see(model, [torch.cat([before, after])], "head").features)
        at = detector.detection().alarm_at
        label = f"{name}: alarm after {at - CLEAN}" if at else f"{name}: no alarm"
        axes.plot(np.arange(1, len(seen) + 1), seen, label=label, linewidth=1.2)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.axvline(CLEAN, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="sample", ylabel="evidence (1 is an alarm)", ylim=(0, 3))
    axes.legend(loc="upper left")
    figure.savefig(HERE / "detection-streams.png", dpi=120)


def draw_sizes(digits: Digits) -> None:
    """Make several profiles of each size; what each measured, and what it does on 8,000 fresh samples."""
    model = digits_cnn().eval()
    fresh = see(model, digits.draw(8000, 9).split(500), "head").features
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for size in SIZES:
        measured, ratios = [], []
        for seed in range(PROFILES):
            profile = ReferenceProfile.fit(model, torch.split(digits.draw(size, 100 + seed), 100), target_arl=TARGET)
            vectors = profile.encode(fresh)[1]
            largest = largest_evidence(
                Pool.of(vectors, profile.levels),
                profile.sketch.dimensions,
                profile.levels,
                streams=128,
                horizons=[2000],
                rng=np.random.default_rng(seed),
            )
            alarms = int((largest[0] >= profile.threshold(TARGET)[:, None]).any(0).sum())
            ratios.append(mean_run_length(alarms, 128, 2000) / TARGET)
            measured.append(profile.measured_arl.mean / TARGET)
        first = size == SIZES[0]
        axes.plot([0.96 * size] * len(ratios), ratios, "o", color="tab:blue", label="true" if first else None)
        axes.plot([1.04 * size] * len(ratios), measured, "x", color="tab:orange", label="measured" if first else None)
        print(size, np.round(ratios, 2), np.round(measured, 2), flush=True)  # noqa: T201 - a script
    axes.axhspan(0.5, 3, color="tab:green", alpha=0.12)
    axes.set(xscale="log", yscale="log", xlabel="samples of the reference", ylabel="run length / asked for")
    axes.legend()
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    figure.savefig(HERE / "detection-sizes.png", dpi=120)


def main() -> None:
    """Draw both."""
    mpl.use("agg")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    digits = Digits()
    profile = ReferenceProfile.fit(digits_cnn(), torch.split(digits.draw(1500, 1), 100), target_arl=TARGET)
    draw_streams(profile, digits)
    draw_sizes(digits)


if __name__ == "__main__":
    main()
