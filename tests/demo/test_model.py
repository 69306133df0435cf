"""The demo's model: packaged weights that are good in eval mode, and what happens to them without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import safetensors
import torch

from guardserve.batchnorm import batchnorm_layers
from guardserve.demo.digits import SHIFTS, Digits, DigitSet, load_digits
from guardserve.demo.model import WEIGHTS, DigitsCNN, digits_cnn
from guardserve.demo.train import accuracy, describe, fit


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Load the real digits once."""
    return load_digits()


@pytest.fixture
def weights() -> Iterator[Path]:
    """Give the path of the packaged weights."""
    with resources.as_file(resources.files("guardserve.demo").joinpath(WEIGHTS)) as path:
        yield path


def test_the_packaged_model_recognises_live_digits_in_eval_mode(digits: Digits) -> None:
    """Of images that took no part in training, at least 95 % are recognised."""
    assert accuracy(digits_cnn().eval(), digits.live) >= 0.95


def test_the_factory_returns_a_training_model_with_five_batchnorm_layers() -> None:
    """As a forgetful engineer's factory would: every module is in training mode."""
    model = digits_cnn()
    assert all(module.training for module in model.modules())
    assert [layer.num_features for _, layer in batchnorm_layers(model)] == [16, 32, 32, 64, 64]


def test_two_models_from_the_factory_share_nothing(digits: Digits) -> None:
    """What one model does to its running statistics leaves the next model as packaged."""
    digits_cnn()(digits.live.images * 100)
    assert accuracy(digits_cnn().eval(), digits.live) >= 0.95


def test_the_example_input_fits_the_model() -> None:
    """The declared example runs through forward by name and gives one row of ten logits."""
    example: dict[str, torch.Tensor] = vars(digits_cnn)["example_input"]
    assert list(example) == ["image"]
    assert digits_cnn().eval()(**example).shape == (1, 10)


def test_weights_file_is_small_and_tells_its_measured_accuracies(weights: Path, digits: Digits) -> None:
    """The file is under 1 MB, and the figures in its metadata are those that the packaged model reaches."""
    assert weights.stat().st_size < 1_000_000
    with safetensors.safe_open(weights, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
    measured = describe(digits_cnn().eval(), digits)
    assert training.keys() == measured.keys()
    for figure in ("accuracy_reference", "accuracy_live", "seed"):
        assert training[figure] == measured[figure]


def test_left_in_training_mode_single_requests_are_guesses_with_finite_outputs(digits: Digits) -> None:
    """One image at a time in training mode: accuracy near one in ten, and nothing that looks like an error."""
    model = digits_cnn()
    logits = torch.cat([model(image[None]).detach() for image in digits.live.images])
    assert logits.isfinite().all()
    assert (logits.argmax(dim=1) == digits.live.labels).double().mean() < 0.2


def test_running_statistics_fit_clean_data(digits: Digits) -> None:
    """Over all reference images each channel's standardised input has mean about 0 and deviation about 1."""
    model = digits_cnn().eval()
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in batchnorm_layers(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.inference_mode():
        model(digits.reference.images)
    for name, layer in batchnorm_layers(model):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        deviation = (layer.running_var + layer.eps).sqrt()
        values = inputs[name].transpose(0, 1).flatten(1)
        assert ((values.mean(dim=1) - layer.running_mean) / deviation).square().mean().sqrt() < 0.1, name
        assert (values.std(dim=1) / deviation - 1).square().mean().sqrt() < 0.1, name


@pytest.mark.parametrize("name", SHIFTS)
def test_every_shift_breaks_the_model_without_an_error(name: str, digits: Digits) -> None:
    """Under each shift of the demo the outputs stay finite while accuracy falls below 60 %."""
    model = digits_cnn().eval()
    torch.manual_seed(0)
    shifted = DigitSet(SHIFTS[name](digits.live.images), digits.live.labels)
    assert model(shifted.images).isfinite().all()
    assert accuracy(model, shifted) < 0.6


def test_fitting_twice_gives_the_same_model_and_leaves_the_random_state(digits: Digits) -> None:
    """Training depends on its own seed alone and gives torch's random state back."""
    few = DigitSet(digits.train.images[:64], digits.train.labels[:64])
    states: list[dict[str, torch.Tensor]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = fit(few, augmented_epochs=1, clean_epochs=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        states.append(model.state_dict())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
        assert not torch.equal(tensor, DigitsCNN().state_dict()[key]), key
