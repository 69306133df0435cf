"""How far single profiles keep the run length that they are asked for: many of each size, on fresh clean digits.

    python benchmarks/detection_calibration.py [--sizes 200 500 1000 2000] [--profiles 20]

The digits are those of detection.py, of which there is no end. Printed are quantiles over profiles of the true run
length, as a multiple of the one asked for, and the shares of profiles that leave the band that is promised.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from detection import Digits
from detectors import see

from guardserve.demo.model import digits_cnn
from guardserve.detection.calibration import Pool, largest_evidence, mean_run_length
from guardserve.detection.cautions import BAND
from guardserve.monitor import ReferenceProfile

FRESH, STREAMS, HORIZON = 20_000, 256, 2000
TARGETS = (1000, 10_000)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def run_lengths(profile: ReferenceProfile, fresh: np.ndarray, targets: Sequence[float], seed: int = 0) -> list[float]:
    """Return the run length on features of fresh clean samples for each target, as a multiple of it."""
    pool = Pool.of(profile.encode(fresh)[1], profile.levels)
    largest = largest_evidence(
        pool,
        profile.sketch.dimensions,
        profile.levels,
        streams=STREAMS,
        horizons=[HORIZON],
        rng=np.random.default_rng(seed),
    )[0]
    alarms = [int((largest >= profile.threshold(target)[:, None]).any(0).sum()) for target in targets]
    return [mean_run_length(count, STREAMS, HORIZON) / target for count, target in zip(alarms, targets, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=(200, 500, 1000, 2000))
    parser.add_argument("--profiles", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    digits, model = Digits(), digits_cnn().eval()
    fresh = see(model, digits.draw(FRESH, 9).split(500), "head").features
    quantiles = " | ".join(f"{quantile:.0%}" for quantile in QUANTILES)
    print(f"| samples | asked for | {quantiles} | below {BAND[0]:g} | above {BAND[1]:g} |")
    print("|---" * (len(QUANTILES) + 4) + "|")
    for size in options.sizes:
        samples = (digits.draw(size, 100 + seed).split(100) for seed in range(options.profiles))
        profiles = (ReferenceProfile.fit(model, batches, target_arl=TARGETS[0]) for batches in samples)
        found = np.array([run_lengths(profile, fresh, TARGETS) for profile in profiles])
        for target, ratios in zip(TARGETS, found.T, strict=True):
            cells = " | ".join(f"{value:.2f}" for value in np.quantile(ratios, QUANTILES))
            below, above = (ratios < BAND[0]).mean(), (ratios > BAND[1]).mean()
            print(f"| {size} | {target} | {cells} | {below:.0%} | {above:.0%} |", flush=True)


if __name__ == "__main__":
    main()
