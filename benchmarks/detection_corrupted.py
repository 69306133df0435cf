"""How soon corrupted photos are noticed, beside other detectors at the same measured rate of false alarms.

    pip install --no-deps corrupt-tta opencv-python-headless alibi-detect river
    python benchmarks/detection_corrupted.py [--arl 1000] [--streams 24] [--reference 2000]

The model is a pretrained MobileNetV2, the samples are crops of photos, and the shifts are corrupt-tta's 19 corruptions
at severities 1, 3 and 5. The detectors are those of detectors.py; one that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from guardserve.monitor import ReferenceProfile

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import mobilenet  # the tests' model and checkpoint
from detectors import compare, guardserve, mewma, peers, see, show, whitened_layers

SIZE, LAST = 96, "classifier"
SEVERITIES = (1, 3, 5)
MIRRORED = 0.5
CLEAN, SHIFTED = 2000, 50
"""Clean samples to set thresholds with, and as many to measure with; samples of each shift."""


def photos() -> list[npt.NDArray[np.uint8]]:
    """Return photos in RGB."""
    found = []
    for path in sorted(mobilenet.package_file("foolbox", "data").glob("imagenet_*.jpg")):
        with Image.open(path) as photo:
            found.append(np.asarray(photo.convert("RGB")))
    return found


def crops(images: Sequence[npt.NDArray[np.uint8]], count: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Cut random squares out of random photos, half of them mirrored."""
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for row in out:
        image = images[rng.integers(len(images))]
        side = int(min(image.shape[:2]) * rng.uniform(0.4, 1))
        y, x = (rng.integers(0, length - side + 1) for length in image.shape[:2])
        square = np.asarray(Image.fromarray(image[y : y + side, x : x + side]).resize((SIZE, SIZE)))
        row[:] = square[:, ::-1] if rng.random() < MIRRORED else square
    return out


def batches(images: npt.NDArray[np.uint8]) -> Iterator[torch.Tensor]:
    """Normalise images as the model expects them."""
    for start in range(0, len(images), 50):
        pixels = torch.from_numpy(images[start : start + 50]).permute(0, 3, 1, 2).float() / 255
        yield (pixels - mobilenet.MEAN) / mobilenet.STD


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arl", type=float, default=1000, help="samples between false alarms")
    parser.add_argument("--streams", type=int, default=24, help="streams of each shift; the slow peers get a sixth")
    parser.add_argument("--reference", type=int, default=2000, help="samples of the reference")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from corrupt_tta import corrupt, corruption_dict  # noqa: PLC0415 - after the usage has been printed

    model = mobilenet.mobilenet_v2()
    model.load_state_dict(torch.load(mobilenet.weights(), weights_only=True))
    images, rng = photos(), np.random.default_rng(0)
    started = time.monotonic()
    drawn = crops(images, arguments.reference, rng)
    profile = ReferenceProfile.fit(model, batches(drawn), target_arl=arguments.arl)
    reference = see(model, batches(drawn), LAST)
    clean = (see(model, batches(crops(images, CLEAN, rng)), LAST), see(model, batches(crops(images, CLEAN, rng)), LAST))
    base, shifted = crops(images, SHIFTED, rng), {}
    for name in corruption_dict:
        for severity in SEVERITIES:
            np.random.seed(zlib.crc32(f"{name} {severity}".encode()))  # noqa: NPY002 - what corrupt-tta draws from
            pixels = [np.asarray(corrupt(image, severity=severity, corruption_name=name)) for image in base]
            shifted[f"{name} {severity}"] = see(model, batches(np.stack(pixels).astype(np.uint8)), LAST)
    print(f"features of {len(drawn) + 2 * CLEAN + len(shifted) * SHIFTED} crops: {time.monotonic() - started:.0f} s")
    rivals = {
        "guardserve": guardserve(profile, arguments.arl),
        "whitened": mewma(whitened_layers(reference, profile.sketch.channels)),
        **dict(peers(reference, arguments.arl)),
    }
    rows = compare(rivals, clean, shifted, arguments.arl, arguments.streams)
    show(rows, list(shifted), arguments.arl)


if __name__ == "__main__":
    main()
