"""What the tests of the referenced monitor share: the demo's model and an endless supply of clean digits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from guardserve.demo.digits import Digits, load_digits
from guardserve.demo.model import digits_cnn
from guardserve.monitor import ReferenceProfile, ReferenceWarning
from guardserve.observation.features import Array, FeatureReader, execution_order
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

Sampler = Callable[..., torch.Tensor]


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Load the real digits once."""
    return load_digits()


@pytest.fixture(scope="session")
def model() -> nn.Module:
    """Return the demo's model, in training mode as its factory leaves it."""
    return digits_cnn()


@pytest.fixture(scope="session")
def clean(digits: Digits) -> Sampler:
    """Draw clean samples that never repeat: digits that the model was not trained on, each moved a little."""
    images = torch.cat([digits.reference.images, digits.live.images])
    labels = torch.cat([digits.reference.labels, digits.live.labels])

    def draw(count: int, seed: int, classes: tuple[int, ...] = tuple(range(10))) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        chosen = images[torch.isin(labels, torch.tensor(classes))]
        chosen = chosen[torch.randint(len(chosen), (count,), generator=generator)]
        move = (2 * torch.rand(count, 2, 1, generator=generator) - 1) / 8
        turn = torch.eye(2).expand(count, 2, 2) + 0.15 * (2 * torch.rand(count, 2, 2, generator=generator) - 1)
        grid = nn.functional.affine_grid(torch.cat([turn, move], dim=2), list(chosen.shape), align_corners=False)
        return nn.functional.grid_sample(chosen, grid, align_corners=False)

    return draw


@pytest.fixture(scope="session")
def profile(model: nn.Module, clean: Sampler) -> ReferenceProfile:
    """Fit a profile to 1,200 clean samples for a target of 1,000."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        return ReferenceProfile.fit(model, torch.split(clean(1200, seed=1), 100), target_arl=1000)


@pytest.fixture(scope="session")
def features(model: nn.Module) -> Callable[[torch.Tensor], Array]:
    """Read what a referenced monitor reads off the demo's model."""

    def read(images: torch.Tensor) -> Array:
        records: list[Record] = []
        taps = Taps(model.eval(), records.append)
        with torch.inference_mode():
            model(images)
        taps.close()
        order = execution_order(records[0])
        return FeatureReader([taps.points[index] for index in order], order).read(records)

    return read
