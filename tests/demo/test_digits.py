"""The demo's data: parts that share nothing, and shifts that do what their names say."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guardserve.demo.digits import (
    SHIFTS,
    Digits,
    DigitSet,
    blurred,
    brighter,
    faded,
    inverted,
    load_digits,
    noisy,
)
from guardserve.exceptions import MissingExtraError


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Load the real digits once."""
    return load_digits()


def parts(digits: Digits) -> list[DigitSet]:
    """List the three parts."""
    return [getattr(digits, field.name) for field in fields(digits)]


def test_every_image_is_in_exactly_one_part(digits: Digits) -> None:
    """The 1,797 images are pairwise different, so no part holds an image, or a copy of one, of another part."""
    sizes = [len(part.images) for part in parts(digits)]
    pixels = torch.cat([part.images for part in parts(digits)]).flatten(1)
    assert sizes == [901, 451, 445]
    assert len({tuple(image) for image in pixels.tolist()}) == 1797


def test_parts_hold_tensors_in_the_documented_form(digits: Digits) -> None:
    """Images are float32 of shape (N, 1, 8, 8) that use all of [0, 1]; labels are int64 of shape (N,)."""
    for part in parts(digits):
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert part.images.shape == (*part.labels.shape, 1, 8, 8)
        assert part.images.min() == 0
        assert part.images.max() == 1


def test_classes_are_in_proportion_in_every_part(digits: Digits) -> None:
    """Each class has its quarter in reference and in live, and the rest in train, to within one image."""
    train, reference, live = (part.labels.bincount() for part in parts(digits))
    assert len(train) == len(reference) == len(live) == 10
    total = train + reference + live
    assert ((total - 4 * reference).abs() < 4).all()
    assert ((total - 4 * live).abs() < 4).all()


def test_labels_stay_with_their_images(digits: Digits) -> None:
    """The nearest class mean of the train part is an image's own class for most of the live images."""
    means = torch.stack([digits.train.images[digits.train.labels == digit].mean(dim=0) for digit in range(10)])
    nearest = torch.cdist(digits.live.images.flatten(1), means.flatten(1)).argmin(dim=1)
    assert (nearest == digits.live.labels).double().mean() > 0.85


def test_parts_are_shuffled(digits: Digits) -> None:
    """From one label to the next every difference is about as frequent: neither sorted, nor cyclic, nor dealt out."""
    for part in parts(digits):
        steps = (part.labels.diff() % 10).bincount(minlength=10) / (len(part.labels) - 1)
        assert (steps - 0.1).abs().max() < 0.05  # 3.5 standard deviations of a random order of 445


def test_loading_twice_gives_the_same_parts(digits: Digits) -> None:
    """The split depends on nothing but the data: not on torch's or Python's random state."""
    torch.manual_seed(1)
    for first, second in zip(parts(digits), parts(load_digits()), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


def test_the_split_is_the_one_that_the_packaged_weights_were_trained_on(digits: Digits) -> None:
    """A split that changed would put training images among the live ones: its first labels are pinned."""
    assert [part.labels[:12].tolist() for part in parts(digits)] == [
        [1, 3, 2, 4, 9, 5, 6, 3, 5, 4, 4, 1],
        [3, 2, 9, 3, 9, 9, 4, 0, 1, 6, 5, 7],
        [0, 0, 1, 4, 7, 3, 3, 5, 5, 8, 7, 3],
    ]


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn the error says which extra to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'handwritten digits needs the "demo" extra.*guardserve\[demo\]'):
        load_digits()


@pytest.mark.parametrize("name", SHIFTS)
def test_every_shift_keeps_the_form_of_the_images_and_changes_them(name: str, digits: Digits) -> None:
    """A shift returns new float32 images of the same shape within [0, 1] and leaves its argument alone."""
    images = digits.live.images
    before = images.clone()
    shifted = SHIFTS[name](images)
    assert torch.equal(images, before)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.float32
    assert 0 <= shifted.min() < shifted.max() <= 1
    assert ((shifted - images).abs().amax(dim=(1, 2, 3)) > 0.1).all()


@given(st.floats(0, 1), st.floats(0, 1))
def test_pixelwise_shifts_equal_their_formulas(pixel: float, amount: float) -> None:
    """Brighter adds and saturates, faded scales about mid-grey, inverted mirrors."""
    image = torch.tensor([[[[pixel]]]], dtype=torch.float64)
    assert brighter(image, amount).item() == min(1.0, pixel + amount)
    assert faded(image, amount).item() == pytest.approx(0.5 + amount * (pixel - 0.5))
    assert inverted(image).item() == 1 - pixel


def test_noise_has_the_standard_deviation_asked_for_and_repeats_with_its_generator() -> None:
    """On mid-grey, far from clipping, the noise is centred with the given spread; equal seeds give equal noise."""
    grey = torch.full((400, 1, 8, 8), 0.5)
    first, second = (noisy(grey, 0.1, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.mean().item() == pytest.approx(0.5, abs=0.003)
    assert first.std().item() == pytest.approx(0.1, rel=0.03)


def test_blur_spreads_a_point_over_its_neighbours_and_leaves_flat_images_flat() -> None:
    """The kernel sums to 1, is symmetric, and has the Gaussian's ratio between neighbours."""
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(blurred(flat, 1.5), flat)
    point = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    point[0, 0, 4, 4] = 1
    spread = blurred(point, 1.5)[0, 0]
    assert spread.sum().item() == pytest.approx(1)
    torch.testing.assert_close(spread, spread.T)
    assert (spread[4, 5] / spread[4, 4]).log().item() == pytest.approx(-1 / (2 * 1.5**2))
