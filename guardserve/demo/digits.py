"""The demo's data: scikit-learn's handwritten digits in three parts, and the shifts that the demo applies to them."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from guardserve.exceptions import MissingExtraError

SPLIT_SEED = 0
_QUARTERS = ("train", "reference", "train", "live")


@dataclass(frozen=True, eq=False)
class DigitSet:
    """Images with their labels.

    Attributes:
        images: float32 of shape ``(N, 1, 8, 8)``, black 0 to white 1.
        labels: int64 of shape ``(N,)``, the digits 0 to 9.
    """

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Digits:
    """The handwritten digits in three parts that share no image, each shuffled and with the classes in proportion.

    Attributes:
        train: Half of the images, on which the model is trained.
        reference: A quarter, on which a reference profile is made.
        live: A quarter, which plays the traffic in production.
    """

    train: DigitSet
    reference: DigitSet
    live: DigitSet


def load_digits() -> Digits:
    """Load the 1,797 digits and split them, always in the same way.

    Returns:
        Parts of 901, 451 and 445 images.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise MissingExtraError("The demo's handwritten digits", "demo") from error
    grey_levels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(grey_levels / 16).float().reshape(-1, 1, 8, 8)
    return _split(DigitSet(images, torch.from_numpy(labels).long()))


def _split(digits: DigitSet) -> Digits:
    generator = random.Random(SPLIT_SEED)  # noqa: S311 # nosec B311
    labels = digits.labels.tolist()
    seen: Counter[int] = Counter()
    parts: dict[str, list[int]] = {"train": [], "reference": [], "live": []}
    for index in _shuffled(range(len(labels)), generator):
        label = labels[index]
        parts[_QUARTERS[seen[label] % 4]].append(index)
        seen[label] += 1
    # dealt out in turn, equal labels keep a distance that independent requests would not: shuffle once more
    orders = {part: _shuffled(indices, generator) for part, indices in parts.items()}
    return Digits(**{part: DigitSet(digits.images[order], digits.labels[order]) for part, order in orders.items()})


def _shuffled(indices: Iterable[int], generator: random.Random) -> list[int]:
    # random() keeps its sequence across Python versions, which the generators of torch and numpy do not promise:
    # a split that changed would put images that the packaged weights were trained on among the live ones
    return sorted(indices, key=lambda _: generator.random())


def brighter(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Raise every pixel by ``amount``, up to white: a camera whose black level has moved."""
    return (images + amount).clamp(0, 1)


def faded(images: torch.Tensor, contrast: float) -> torch.Tensor:
    """Scale the contrast about mid-grey, 1 leaving the images alone: fog, or a scanner's tired lamp."""
    return 0.5 + contrast * (images - 0.5)


def inverted(images: torch.Tensor) -> torch.Tensor:
    """Swap black and white: ink on paper where the model learnt light on dark."""
    return 1 - images


def noisy(images: torch.Tensor, sigma: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Add Gaussian noise of standard deviation ``sigma``, clipped to black and white: a sensor in the dark.

    The noise comes from ``generator``, or from torch's default one.
    """
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + sigma * noise).clamp(0, 1)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur with a 5x5 Gaussian kernel of ``sigma`` pixels, the edge pixels repeated: a lens out of focus."""
    offsets = torch.arange(-2, 3, dtype=images.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    return nn.functional.conv2d(padded, torch.outer(weights, weights)[None, None])


SHIFTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "brighter": lambda images: brighter(images, 0.5),
        "faded": lambda images: faded(images, 0.4),
        "inverted": inverted,
        "noisy": lambda images: noisy(images, 0.5),
        "blurred": lambda images: blurred(images, 1.5),
    }
)
"""Each shift by its name, at the amount that the demo uses."""
