"""How soon weak and strong shifts of the demo's digits are seen, at the same measured rate of false alarms.

    python benchmarks/detection.py [--arl 1000] [--streams 48] [--reference 1500]

The model is the demo's; its digits, those that it was not trained on, are moved a little each time that one is drawn,
so that clean samples never run out. The detectors are those of detectors.py; one that is not installed is left out.
What guardserve alone promises, the rate at the thresholds that its profile sets from the reference, is printed below.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import torch
from detectors import Seen, compare, guardserve, mewma, orders, peers, see, show, whitened_layers
from torch import nn

from guardserve.demo.digits import SHIFTS, blurred, brighter, faded, load_digits, noisy
from guardserve.demo.model import digits_cnn
from guardserve.detection.calibration import mean_run_length
from guardserve.monitor import ReferenceProfile

POOL, SHIFTED = 8000, 1000
"""Clean samples that set a threshold, and as many that measure it; samples of each shift."""


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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arl", type=float, default=1000, help="samples between false alarms")
    parser.add_argument("--streams", type=int, default=48, help="streams of each shift; slow peers get a sixth")
    parser.add_argument("--reference", type=int, default=1500, help="samples of the reference")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits, model = Digits(), digits_cnn().eval()

    def shown(images: torch.Tensor) -> Seen:
        return see(model, torch.split(images, 500), "head")

    images = digits.draw(arguments.reference, 1)
    profile = ReferenceProfile.fit(model, torch.split(images, 100), target_arl=arguments.arl)
    reference, clean = shown(images), (shown(digits.draw(POOL, 2)), shown(digits.draw(POOL, 3)))
    shifted = {name: shown(shift(digits.draw(SHIFTED, 4))) for name, shift in TABLE.items()}
    for classes in ((1, 7), (0, 2, 4, 6, 8)):
        shifted["only " + ", ".join(map(str, classes))] = shown(digits.draw(SHIFTED, 5, classes))
    rivals = {
        "guardserve": guardserve(profile, arguments.arl),
        "whitened": mewma(whitened_layers(reference, profile.sketch.channels)),
        **dict(peers(reference, arguments.arl)),
    }
    rows = compare(rivals, clean, shifted, arguments.arl, arguments.streams)
    show(rows, list(shifted), arguments.arl)
    own = rivals["guardserve"]([(clean[1], orders(POOL, round(arguments.arl), 256, 4))])
    promised = mean_run_length(int((own >= 1).any(0).sum()), own.shape[1], len(own))
    print(
        f"\nguardserve's own threshold, from {profile.samples} samples, for one in {arguments.arl:.0f}: "
        f"one in {promised:.0f} on {POOL} fresh samples; its profile says {profile.measured_arl.mean:.0f} "
        f"({profile.measured_arl.low:.0f} to {profile.measured_arl.high:.0f})"
    )


if __name__ == "__main__":
    main()
