"""The referenced monitor on a pretrained MobileNetV2 and photos: uniform p-values, and readings with known causes."""

from __future__ import annotations

import math
from collections.abc import Callable

import mobilenet
import numpy as np
import pytest
import torch
from torch import nn

from guardserve import Monitor, ReferenceProfile
from guardserve.monitor import Verdict

SIZE = 64
Sampler = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Return the pretrained model."""
    model = mobilenet.mobilenet_v2()
    model.load_state_dict(torch.load(mobilenet.weights(), weights_only=True))
    return model


@pytest.fixture(scope="module")
def crops() -> Sampler:
    """Draw random crops of the photos, half of them mirrored, pixels from 0 to 1."""
    photos = mobilenet.photos()[0] * mobilenet.STD + mobilenet.MEAN

    def draw(count: int, seed: int, chosen: slice = slice(None)) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        pool, out = photos[chosen], []
        for _ in range(count):
            side = int(rng.integers(96, 200))
            y, x = rng.integers(0, 224 - side, 2)
            crop = pool[rng.integers(len(pool)), None, :, y : y + side, x : x + side]
            crop = nn.functional.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)
            out.append(crop.flip(3) if rng.random() < 0.5 else crop)
        return torch.cat(out).clamp(0, 1)

    return draw


@pytest.fixture(scope="module")
def reference(network: nn.Module, crops: Sampler) -> ReferenceProfile:
    """Fit a profile to 800 crops."""
    images = (crops(800, seed=1) - mobilenet.MEAN) / mobilenet.STD
    return ReferenceProfile.fit(network, torch.split(images, 50), target_arl=1000)


def watch(network: nn.Module, reference: ReferenceProfile, images: torch.Tensor) -> tuple[Verdict, list[float]]:
    """Show a fresh monitor a stream of images."""
    with Monitor(network, reference=reference, target_arl=1000) as monitor, torch.inference_mode():
        for batch in torch.split((images - mobilenet.MEAN) / mobilenet.STD, 20):
            network(batch)
        return monitor.verdict(), monitor.scores()


def test_p_values_of_fresh_crops_are_uniform(network: nn.Module, reference: ReferenceProfile, crops: Sampler) -> None:
    """A two-sample Kolmogorov-Smirnov test at 1 % accepts samples that took no part."""
    _, scores = watch(network, reference, crops(300, seed=2))
    ordered, count = np.sort(scores), len(scores)
    steps = np.arange(count + 1) / count
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < 1.63 * math.sqrt(1 / count + 1 / reference.samples)


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Average over 5 x 5 pixels."""
    return nn.functional.avg_pool2d(nn.functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1)


def coarse(images: torch.Tensor) -> torch.Tensor:
    """Give each 2 x 2 pixels one colour."""
    return nn.functional.interpolate(nn.functional.avg_pool2d(images, 2), scale_factor=2.0)


def faint(images: torch.Tensor) -> torch.Tensor:
    """Add noise of 2 % of the range, which late layers hardly see."""
    return images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shift", "words", "within"),
    [
        (lambda x: (x + 0.3).clamp(0, 1), ("input-level",), 12),
        (
            lambda x: x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
            ("input-level", "more"),
            4,
        ),
        (blurred, ("input-level", "vary less"), 12),
        (torch.zeros_like, ("input-level",), 4),
        (coarse, ("input-level", "vary less"), 4),
        (faint, ("input-level", "more"), 12),
    ],
    ids=["brightness", "noise", "blur", "dead sensor", "coarse pixels", "faint noise"],
)
def test_the_reading_names_what_happened_to_the_photos(  # noqa: PLR0917 - three of them are fixtures
    network: nn.Module,
    reference: ReferenceProfile,
    crops: Sampler,
    shift: Callable[[torch.Tensor], torch.Tensor],
    words: tuple[str, ...],
    within: int,
) -> None:
    """Each alarms soon, starts at an early layer, and is read as a change of the input that lasts."""
    verdict, _ = watch(network, reference, torch.cat([crops(40, seed=3), shift(crops(80, seed=4))]))
    assert verdict.alarm_at is not None
    assert 40 < verdict.alarm_at <= 40 + within
    assert verdict.layer is not None
    assert reference.layers.index(verdict.layer) < len(reference.layers) // 3
    assert all(word in verdict.reading for word in words), verdict.reading
    assert verdict.reading.endswith("; lasting")


def test_fewer_kinds_of_photos_are_no_change_of_the_input(
    network: nn.Module, reference: ReferenceProfile, crops: Sampler
) -> None:
    """Crops of four of the twenty photos: no image is odd, yet late layers move most."""
    verdict, _ = watch(network, reference, torch.cat([crops(40, seed=5), crops(250, seed=6, chosen=slice(0, 4))]))
    assert verdict.state == "shifted"
    assert verdict.reading.startswith("semantic or class mix"), verdict.reading
