"""Tests of guardserve.loading.checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from guardserve.exceptions import ModelLoadError, PickleRefusedError
from guardserve.loading import load_model

NESTS = ["state_dict", "model_state_dict", "model"]


class Payload:
    """Pickles to a call that makes a folder: what an attacker's file would do, made harmless and visible."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (self.marker,)  # type: ignore[return-value]


def assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    """Compare every parameter and buffer, bit for bit."""
    state, wanted = module.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Give the name for a file of weights."""
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("nest", [None, *NESTS])
def test_weights_are_loaded_bare_or_nested(
    tiny: nn.Module, tiny_reference: str, weights: Path, nest: str | None, legacy: bool
) -> None:
    """A state_dict may be the file's content, or under one of the usual keys beside an epoch."""
    content = tiny.state_dict() if nest is None else {nest: tiny.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, weights, _use_new_zipfile_serialization=not legacy)
    assert_same_state(load_model(tiny_reference, weights=weights, device="cpu").module, tiny)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_known_by_suffix_and_by_content(
    tiny: nn.Module, tiny_reference: str, tmp_path: Path, suffix: str
) -> None:
    """A file of safetensors is one under any name."""
    path = tmp_path / f"weights{suffix}"
    safetensors.torch.save_file(tiny.state_dict(), path)
    assert_same_state(load_model(tiny_reference, weights=str(path), device="cpu").module, tiny)


def test_the_prefix_of_distributed_training_is_taken_off(
    tiny: nn.Module, tiny_reference: str, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was unwrapped and stripped is logged: nothing happens silently."""
    caplog.set_level(logging.INFO, "guardserve.loading")
    torch.save({"model": {f"module.{key}": value for key, value in tiny.state_dict().items()}}, weights)
    assert_same_state(load_model(tiny_reference, weights=weights, device="cpu").module, tiny)
    assert "took the state_dict under the key 'model'" in caplog.text
    assert f"took the prefix 'module.' off all {len(tiny.state_dict())} keys" in caplog.text


def test_a_prefix_on_some_keys_is_not_taken_off(tiny: nn.Module, tiny_reference: str, weights: Path) -> None:
    """Then it is part of a name, and the keys do not fit."""
    state = {f"module.{key}": value for key, value in tiny.state_dict().items()}
    state["head.bias"] = state.pop("module.head.bias")
    torch.save(state, weights)
    with pytest.raises(ModelLoadError, match=r"unexpected: module\.conv\.weight"):
        load_model(tiny_reference, weights=weights, device="cpu")


def test_a_prefix_that_the_model_has_itself_stays(project: Callable[[str], str], weights: Path) -> None:
    """A wrapper whose only child is called module has that prefix in its own names."""
    name = project("""
        from torch import nn

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = nn.BatchNorm1d(3)

            def forward(self, x):
                return self.module(x)
    """)
    torch.save({f"module.{key}": value + 1 for key, value in nn.BatchNorm1d(3).state_dict().items()}, weights)
    module = load_model(f"{name}:Wrapper", weights=weights, device="cpu", input_shapes=["3"]).module
    assert module.get_parameter("module.weight").tolist() == [2.0, 2.0, 2.0]


def test_weights_that_do_not_fit_are_listed(tiny: nn.Module, tiny_reference: str, weights: Path) -> None:
    """The error names the file and the model, and the first keys of each kind of difference, with counts and shapes."""
    state = tiny.state_dict()
    del state["norm.running_mean"], state["head.bias"]
    state["head.weight"] = torch.zeros(5, 4)
    state |= {f"extra{index}": torch.zeros(1) for index in range(6)}
    torch.save(state, weights)
    with pytest.raises(ModelLoadError) as caught:
        load_model(tiny_reference, weights=weights, device="cpu")
    message = str(caught.value)
    assert f"the weights in {weights} do not fit Net: " in message
    assert "2 missing: norm.running_mean, head.bias;" in message
    assert "6 unexpected: extra0, extra1, extra2, extra3, ...;" in message
    assert message.endswith("1 of another shape: head.weight ([5, 4] in the file, [2, 4] in the model)")


def test_weights_of_a_type_that_would_be_cut_are_refused(tiny: nn.Module, tiny_reference: str, weights: Path) -> None:
    """Complex values do not become real ones by losing their imaginary part."""
    torch.save({key: value.to(torch.complex64) for key, value in tiny.state_dict().items()}, weights)
    with pytest.raises(ModelLoadError, match=r"is torch\.complex64, and torch\.\w+ cannot hold it"):
        load_model(tiny_reference, weights=weights, device="cpu")


def test_a_lazy_model_without_weights_is_refused(project: Callable[[str], str]) -> None:
    """Its layers have no shape, so nothing could be served; the error says how to give them one."""
    name = project("from torch import nn\ndef net(): return nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())")
    with pytest.raises(ModelLoadError, match="run one forward in its factory"):
        load_model(f"{name}:net", device="cpu", input_shapes=["3"])


def test_weights_fill_a_lazy_layer(project: Callable[[str], str], weights: Path) -> None:
    """A layer without a shape takes the one of its weights, and one with other keys is refused as any other."""
    name = project("from torch import nn\ndef net(): return nn.LazyBatchNorm1d()")
    torch.save(nn.BatchNorm1d(3).state_dict(), weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules", category=UserWarning)
        module = load_model(f"{name}:net", weights=weights, device="cpu", input_shapes=["3"]).module
        assert_same_state(module, nn.BatchNorm1d(3))
        torch.save(nn.Linear(3, 3).state_dict(), weights)
        with pytest.raises(ModelLoadError, match=r"3 missing: running_mean, running_var, num_batches_tracked$"):
            load_model(f"{name}:net", weights=weights, device="cpu", input_shapes=["3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state_dict"),
        (torch.zeros(3), "holds a Tensor, not a state_dict"),
        ({}, "does not hold a state_dict.*its keys are none"),
        ({"state_dict": {}}, "does not hold a state_dict.*its keys are none"),
        ({"epoch": 3, "net": {}}, "its keys are epoch, net, and 'epoch' is a int"),
        ({3: torch.zeros(1)}, "its keys are 3, and 3 is a Tensor"),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {"b": torch.zeros(1)}}, r"several .*\(state_dict, model\)"),
    ],
)
def test_content_that_is_no_state_dict_is_refused(
    tiny_reference: str, weights: Path, content: object, message: str
) -> None:
    """The error names the file and what it holds instead; of two state_dicts none is guessed at."""
    torch.save(content, weights)
    with pytest.raises(ModelLoadError, match=f"{weights}.*{message}"):
        load_model(tiny_reference, weights=weights, device="cpu")


def test_weights_for_a_saved_program_are_refused(exported: Path, scripted: Path, tiny_reference: str) -> None:
    """A program has its weights; and a program is no file of weights."""
    with pytest.raises(ModelLoadError, match=r"is a torch\.export archive: leave them out"):
        load_model(str(exported), weights=scripted, device="cpu")
    with pytest.raises(ModelLoadError, match="is a TorchScript program, not a file of weights"):
        load_model(tiny_reference, weights=scripted, device="cpu")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_state_dict_is_no_model(tiny: nn.Module, tmp_path: Path, suffix: str) -> None:
    """The error says how to serve it."""
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": tiny.state_dict()}, path)
    with pytest.raises(ModelLoadError, match=r"no code to run them.*package.module:factory --weights .*weights"):
        load_model(str(path), device="cpu", input_shapes=["3,8,8"])


def test_safetensors_are_no_model(tiny: nn.Module, tmp_path: Path) -> None:
    """They are a state_dict like any other."""
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tiny.state_dict(), path)
    with pytest.raises(ModelLoadError, match="is a state_dict: it holds weights, but no code"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("as_weights", [False, True], ids=["model", "weights"])
def test_a_pickle_is_refused_and_does_not_run(
    tiny_reference: str, weights: Path, tmp_path: Path, legacy: bool, as_weights: bool
) -> None:
    """A file with a payload is refused with reason and remedy; loaded as torch once did, it does run."""
    marker = tmp_path / "owned"
    torch.save({"state_dict": Payload(marker)}, weights, _use_new_zipfile_serialization=not legacy)
    source, options = (tiny_reference, {"weights": weights}) if as_weights else (str(weights), {})
    with pytest.raises(PickleRefusedError, match=r"would run code from the file.*state_dict\(\).*--allow-pickle"):
        load_model(source, device="cpu", **options)  # type: ignore[arg-type]
    assert not marker.exists()
    torch.load(weights, weights_only=False)
    assert marker.is_dir()


def test_a_pickled_module_is_refused_by_name(tiny: nn.Module, weights: Path) -> None:
    """The reason names what was pickled."""
    torch.save(tiny, weights)
    with pytest.raises(PickleRefusedError, match=r"holds a pickled [\w.]*TinyNet"):
        load_model(str(weights), device="cpu", input_shapes=["3,8,8"])


def test_a_pickled_module_loads_where_pickle_is_allowed(
    weights: Path, tiny_reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is served with its own example, and a warning is logged."""
    model = load_model(tiny_reference, device="cpu").module
    model.example_input = {"image": torch.zeros(1, 3, 9, 9)}  # type: ignore[assignment]
    torch.save(model, weights)
    loaded = load_model(str(weights), device="cpu", allow_pickle=True)
    assert_same_state(loaded.module, model)
    assert (loaded.platform, loaded.name) == ("pytorch_eager", "weights")
    assert loaded.inputs[0].shape == (-1, 3, 9, 9)
    assert "unpickling" in caplog.text


def test_weights_beside_a_pickle_load_where_pickle_is_allowed(
    tiny: nn.Module, tiny_reference: str, weights: Path
) -> None:
    """A checkpoint with an object beside its weights is taken when the user trusts it."""
    torch.save({"state_dict": tiny.state_dict(), "config": Path("config.yaml")}, weights)
    with pytest.raises(PickleRefusedError, match="pathlib"):
        load_model(tiny_reference, weights=weights, device="cpu")
    loaded = load_model(tiny_reference, weights=weights, device="cpu", allow_pickle=True)
    assert_same_state(loaded.module, tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Path("config.yaml"), "holds a .*Path, not a state_dict or a module"),
        (Payload(Path("/")), "cannot be unpickled: FileExistsError.*must be importable"),
    ],
)
def test_an_allowed_pickle_that_gives_no_module_is_refused(weights: Path, content: Any, message: str) -> None:
    """The error says what it gave, or why it failed."""
    torch.save(content, weights)
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(weights), device="cpu", allow_pickle=True)
