"""A pretrained network on real photos: the monitored statistics against float64, all positions read or some."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mobilenet import MobileNetV2, photos, weights
from torch import nn

from guardserve.observation.features import FeatureReader, execution_order
from guardserve.observation.reading import VALUES
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps

Features = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Load the pretrained network."""
    model = MobileNetV2()
    model.load_state_dict(torch.load(weights(), weights_only=True))
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def observed(network: nn.Module, values: int | None, first_turn: int = 0) -> Features:
    """Return means and deviations of ``z``, shape ``(20, channels)``, one photo a forward, and the layer of each."""
    records: list[Record] = []
    taps = Taps(network, records.append, values)
    try:
        for _ in range(first_turn):
            taps._turn((photos()[0][:1].shape, values, True))
        with torch.inference_mode():
            for photo in photos()[0]:
                network(photo[None].contiguous(memory_format=torch.channels_last))
        order = execution_order(records[0])
        reader = FeatureReader([taps.points[index] for index in order], order)
        features = reader.read(records)
    finally:
        taps.close()
    half = features.shape[1] // 2
    layers = np.repeat(np.arange(len(reader.channels)), reader.channels)
    return features[:, :half], features[:, half:], layers


def exact(network: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Compute the same in float64, from everything that enters each layer, by hooks of the test's own."""
    means: list[torch.Tensor] = []
    deviations: list[torch.Tensor] = []

    def hook(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        mean, var = layer.get_buffer("running_mean").double(), layer.get_buffer("running_var").double()
        z = (args[0].double() - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        means.append(z.mean((2, 3)))
        deviations.append(z.flatten(2).std(-1, correction=0))

    handles = [m.register_forward_pre_hook(hook) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    rows = []
    with torch.inference_mode():
        for photo in photos()[0]:
            network(photo[None].contiguous(memory_format=torch.channels_last))
            rows.append((torch.cat(means, 1).numpy(), torch.cat(deviations, 1).numpy()))
            means.clear()
            deviations.clear()
    for handle in handles:
        handle.remove()
    both = zip(*rows, strict=True)
    mean, deviation = (np.concatenate(part) for part in both)
    return mean, deviation


def per_layer(squares: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Average over photos and over the channels of each layer, and take the root."""
    root: np.ndarray = np.sqrt(np.bincount(layers, squares.mean(0)) / np.bincount(layers))
    return root


def test_reading_all_equals_float64(network: nn.Module) -> None:
    """Each of 17,056 channels on each photo, whatever the convolutions' own rounding."""
    mean, deviation, _ = observed(network, None)
    exact_mean, exact_deviation = exact(network)
    np.testing.assert_allclose(mean, exact_mean, atol=2e-4)
    np.testing.assert_allclose(deviation, exact_deviation, rtol=1e-4, atol=2e-4)


def test_reading_some_is_as_near_as_documented_and_not_biased(network: nn.Module) -> None:
    """The errors that ``reading.VALUES`` states, per layer and photo; over 200 forwards of them, they average out."""
    exact_mean, exact_deviation = exact(network)
    errors, squares = [], []
    for run in range(10):
        mean, deviation, layers = observed(network, VALUES, first_turn=20 * run)
        errors.append(mean - exact_mean)
        squares.append(deviation**2 + mean**2 - exact_deviation**2 - exact_mean**2)
    typical = per_layer(np.concatenate(errors) ** 2, layers)
    assert np.median(typical) < 0.2
    assert typical.max() < 0.5
    assert per_layer(np.mean(errors, axis=0) ** 2, layers).max() < 0.2  # of 10 forwards of each photo
    channels = np.bincount(layers)
    for found, most in ((errors, 0.02), (squares, 0.05)):
        assert np.abs(np.bincount(layers, np.concatenate(found).mean(0)) / channels).max() < most
