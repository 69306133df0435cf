"""What judging costs: microseconds of one core for a sample, with the features of all layers already read.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/detection_cost.py

The channels are those of ResNet-50 and MobileNetV2; the features are random, as the cost does not depend on them.
"""

from __future__ import annotations

import time

import numpy as np

from guardserve.detection.calibration import ARLS, RunLength
from guardserve.detection.chart import LAMBDAS, SHARES, Levels
from guardserve.detection.detector import Detector
from guardserve.detection.encoding import Sketch, Whitening
from guardserve.detection.mixtures import Mixtures
from guardserve.detection.reference import WIDTH, ReferenceProfile

RESNET50 = [
    64,
    *(
        channels
        for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512))
        for block in range(blocks)
        for channels in ([width, width, 4 * width, 4 * width] if block == 0 else [width, width, 4 * width])
    ),
]
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
SAMPLES = 256


def mobilenet_v2() -> list[int]:
    """Return the channels of its BatchNorm layers."""
    layers, channels = [32], 32
    for expansion, outputs, blocks in STAGES:
        for _ in range(blocks):
            layers += [expansion * channels] * (1 + (expansion > 1)) + [outputs]
            channels = outputs
    return [*layers, 1280]


def profile(channels: list[int], features: np.ndarray) -> ReferenceProfile:
    """Make a profile whose charts have no reason to alarm."""
    rng, layers = np.random.default_rng(0), len(channels)
    sketch = Sketch.fit(features, channels, WIDTH, rng)
    sketches = sketch.project(sketch.standardise(features))
    whitening = Whitening.fit(sketches, sketch.dimensions)
    vectors = whitening.apply(sketches)
    levels = Levels.of_lengths(vectors)
    low, high = (np.full((len(LAMBDAS), layers), level, np.float32) for level in (0, 100))
    return ReferenceProfile(
        layers=tuple(map(str, range(layers))),
        fingerprint="",
        samples=len(features),
        distinct_samples=len(features),
        nonfinite_samples=0,
        repeated_samples=0,
        target_arl=10_000,
        measured_arl=RunLength(1, 1, 1),
        sketch=sketch,
        whitening=whitening,
        levels=levels.with_charts(low, high),
        mixtures=Mixtures.fit(vectors, levels),
        thresholds=np.full((len(SHARES), len(ARLS)), 5.0),
        scores=np.sort(rng.random(1000)),
    )


def main() -> None:
    """Print the table."""
    print("| | BatchNorm layers | channels | batch 1 | batch 8 | batch 32 |\n|---|---|---|---|---|---|")
    for name, channels in (("ResNet-50", RESNET50), ("MobileNetV2", mobilenet_v2())):
        features = np.random.default_rng(1).standard_normal((SAMPLES, 2 * sum(channels)), np.float32)
        detector, cells = Detector(profile(channels, features), 10_000), []
        for size in (1, 8, 32):
            best = float("inf")
            for _ in range(8):
                start = time.perf_counter()
                for first in range(0, SAMPLES, size):
                    detector.judge(features[first : first + size])
                best = min(best, time.perf_counter() - start)
            cells.append(f"{best / SAMPLES * 1e6:.0f} us")
        print(f"| {name} | {len(channels)} | {sum(channels)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
