"""Readings of a model of table columns: its layers damp nothing, so depth alone does not tell inputs from classes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import Monitor, ReferenceProfile
from guardserve.detection.chart import Levels
from guardserve.detection.detector import Detector
from guardserve.detection.diagnosis import ShiftAverage
from guardserve.detection.merging import Summary
from guardserve.detection.mixtures import Mixtures
from guardserve.monitor import Verdict
from guardserve.observation.features import Array, FeatureReader, execution_order
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

CLASSES, COLUMNS = 6, 16
Table = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def table() -> Table:
    """Draw rows of correlated columns, some of them skewed, each with about mean 0 and deviation 1."""
    rng = np.random.default_rng(1)
    centres = 1.4 * rng.standard_normal((CLASSES, COLUMNS)) * (rng.random((CLASSES, COLUMNS)) < 0.5)
    common, own = 0.6 * rng.standard_normal((5, COLUMNS)), rng.uniform(0.3, 1, COLUMNS)

    def rows(count: int, seed: int, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels = rng.choice(classes, count)
        x = centres[labels] + rng.standard_normal((count, 5)) @ common + own * rng.standard_normal((count, COLUMNS))
        x[:, ::3] = np.exp(x[:, ::3] / 2)
        return x, labels

    many, _ = rows(5000, 0, tuple(range(CLASSES)))
    centre, deviation = many.mean(0), many.std(0)

    def draw(
        count: int, seed: int, classes: tuple[int, ...] = tuple(range(CLASSES))
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, labels = rows(count, seed, classes)
        return torch.from_numpy((x - centre) / deviation).float(), torch.from_numpy(labels)

    return draw


def hidden(sizes: tuple[int, ...], slope: float) -> list[nn.Module]:
    """Make hidden layers, with the slope of their activation below 0."""
    return [
        block
        for inputs, outputs in pairwise(sizes)
        for block in (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(slope))
    ]


def train(model: nn.Module, draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]], rate: float) -> None:
    """Train a classifier for 400 steps."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for step in range(400):
        x, labels = draw(step)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@pytest.fixture(scope="module")
def classifier(table: Table) -> nn.Module:
    """Train a perceptron of three hidden layers to tell the classes."""
    sizes = (COLUMNS, 64, 48, 32)
    torch.manual_seed(0)
    model = nn.Sequential(*hidden(sizes, 0.0), nn.Linear(sizes[-1], CLASSES))
    train(model, lambda step: table(128, 1000 + step), 3e-3)
    x, labels = table(1000, 5)
    assert (model.eval()(x).argmax(1) == labels).float().mean() > 0.9
    return model


@pytest.fixture(scope="module")
def reference(classifier: nn.Module, table: Table) -> ReferenceProfile:
    """Fit a profile to 1,200 rows."""
    return ReferenceProfile.fit(classifier, torch.split(table(1200, 1)[0], 50), target_arl=1000)


def watch(classifier: nn.Module, reference: ReferenceProfile, rows: torch.Tensor) -> Verdict:
    """Show a fresh monitor a stream."""
    with Monitor(classifier, reference=reference, target_arl=1000) as monitor, torch.inference_mode():
        for batch in torch.split(rows, 20):
            classifier(batch)
        return monitor.verdict()


def noisy(x: torch.Tensor) -> torch.Tensor:
    """Add to each column what varies as much as it does."""
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def exchanged(x: torch.Tensor) -> torch.Tensor:
    """Exchange neighbouring columns of the first eight."""
    return x[:, [1, 0, 3, 2, 5, 4, 7, 6, *range(8, COLUMNS)]]


def other_unit(x: torch.Tensor) -> torch.Tensor:
    """Give a column in units half as large."""
    return torch.cat([x[:, :4], 2 * x[:, 4:5] + 1, x[:, 5:]], 1)


def dead(x: torch.Tensor) -> torch.Tensor:
    """Give one value of a column to all rows."""
    return torch.cat([x[:, :6], torch.full_like(x[:, :1], 2.0), x[:, 7:]], 1)


@pytest.mark.parametrize(
    "shift",
    [noisy, exchanged, other_unit, dead, lambda x: 1.5 * x, lambda x: x.clamp(-1, 1)],
    ids=["noise", "exchanged columns", "other unit", "dead column", "gain", "clipping"],
)
def test_what_happened_to_columns_is_read_as_such(
    classifier: nn.Module, reference: ReferenceProfile, table: Table, shift: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Noise, gain and exchanged columns hardly move the mean of the first layer, but how far its vectors reach."""
    verdict = watch(classifier, reference, torch.cat([table(60, 2)[0], shift(table(200, 3)[0])]))
    assert verdict.state == "shifted"
    assert verdict.reading.startswith("input-level"), verdict.reading


@pytest.mark.parametrize("classes", [(0,), (1,), (4,), (0, 1), (2, 5), (1, 2, 3)])
def test_fewer_classes_are_read_as_such(
    classifier: nn.Module, reference: ReferenceProfile, table: Table, classes: tuple[int, ...]
) -> None:
    """Rows of some classes are as long as the last layer foretells."""
    verdict = watch(classifier, reference, torch.cat([table(60, 2)[0], table(200, 4, classes)[0]]))
    assert verdict.state == "shifted"
    assert verdict.reading.startswith("semantic or class mix"), verdict.reading


def read(classifier: nn.Module, rows: torch.Tensor) -> Array:
    """Read what a referenced monitor reads off the model."""
    records: list[Record] = []
    taps = Taps(classifier, records.append)
    with torch.inference_mode():
        classifier(rows)
    taps.close()
    order = execution_order(records[0])
    return FeatureReader([taps.points[index] for index in order], order).read(records)


def test_summaries_of_many_samples_are_read_as_single_ones_are(
    classifier: nn.Module, reference: ReferenceProfile, table: Table
) -> None:
    """The mean of ten vectors is shorter than they are; what counts is how long they were."""
    for rows, words in ((noisy(table(400, 3)[0]), "input-level"), (table(400, 4, (0, 1))[0], "semantic or class mix")):
        detector = Detector(reference, 1000)
        detector.judge_summary(Summary.of(reference, read(classifier, rows), [row // 10 for row in range(400)]))
        found = detector.detection()
        assert found.state == "shifted"
        assert found.reading.startswith(words), found.reading


def test_the_last_layer_foretells_how_odd_a_mixture_is() -> None:
    """Two classes, one of which has longer vectors: its share sets the mean oddness; noise does not keep to it."""
    rng = np.random.default_rng(0)

    def draw(count: int, share: float) -> Array:
        second = rng.random(count) < share
        early = rng.standard_normal((count, 1, 8)) * np.where(second, 1.5, 0.7)[:, None, None]
        late = 0.3 * rng.standard_normal((count, 1, 8)) + np.where(second, 1, -1)[:, None, None] / np.sqrt(8)
        return np.concatenate([early, late], 1).astype(np.float32)

    clean = draw(4000, 0.5)
    levels = Levels.of_lengths(clean)
    mixtures = Mixtures.fit(clean, levels)
    for share in (0.0, 0.2, 0.9, 1.0):
        vectors = draw(2000, share)
        seen = levels.oddness(np.linalg.norm(vectors, axis=2)).mean(0)
        expected = mixtures.expected(vectors[:, -1].mean(0))
        assert np.abs(seen[0] - expected[0]) < 0.1 * mixtures.spread[0]
        assert abs(seen[0] - mixtures.centre[0]) > 0.4 * mixtures.spread[0]
    noise = clean + np.array([[[1.0], [0.0]]], np.float32) * rng.standard_normal(clean.shape).astype(np.float32)
    seen = levels.oddness(np.linalg.norm(noise, axis=2)).mean(0)
    assert seen[0] - mixtures.expected(noise[:, -1].mean(0))[0] > 0.5 * mixtures.spread[0]


@pytest.mark.parametrize("channels", [1, 2])
def test_clean_samples_of_narrow_layers_are_explained(channels: int) -> None:
    """Many of their vectors are shorter than 1, and one layer is constant but for rounding."""
    torch.manual_seed(0)
    constant = nn.Linear(channels, channels)
    nn.init.constant_(constant.weight, 1e-7)
    model = nn.Sequential(nn.BatchNorm1d(channels), constant, nn.BatchNorm1d(channels))
    profile = ReferenceProfile.fit(model, torch.split(torch.randn(1200, channels), 100), target_arl=1000)
    features, vectors, length = profile.encode(read(model.eval(), torch.randn(1000, channels)))
    assert (profile.levels.high[-1] > 0).tolist() == [True, False]
    average = ShiftAverage(features, vectors, profile.levels.oddness(length))
    assert average.unexplained(profile) < 0.15


def test_mixtures_of_classes_are_read_as_such_in_narrow_layers() -> None:
    """Clean samples of four channels differ in nearly every direction; how odd layers are still tells other inputs."""
    angle = torch.arange(5) * (2 * torch.pi / 5)
    centres = 1.8 * torch.stack([angle.cos(), angle.sin()], 1)

    def draw(count: int, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
        return centres[labels] + 0.5 * torch.randn(count, 2, generator=generator), labels

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), *hidden((2, 4, 4, 4), 0.2), nn.Linear(4, 5))
    train(model, lambda step: draw(128, 1000 + step), 1e-2)
    reference = ReferenceProfile.fit(model.eval(), torch.split(draw(1200, 1)[0], 50), target_arl=1000)
    mixtures = [(first, (first + step) % 5) for first in range(5) for step in (1, 2)]
    verdicts = [watch(model, reference, torch.cat([draw(60, 2)[0], draw(200, 4, some)[0]])) for some in mixtures]
    readings = [verdict.reading.split(":")[0] for verdict in verdicts if verdict.state == "shifted"]
    assert readings.count("semantic or class mix") >= 9
    for rows in (noisy(draw(200, 3)[0]), 1.6 * draw(200, 3)[0]):
        assert watch(model, reference, torch.cat([draw(60, 2)[0], rows])).reading.startswith("input-level")
