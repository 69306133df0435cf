"""What the command line can be asked to audit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit.models import Tabular, ToTheLongest, codes, convolutional, hits, residual
from audit.programs import exported, silence, traced
from safetensors.torch import save_file
from torch import nn

from guardserve.audit.engine import audit_subject
from guardserve.audit.example_files import load_example
from guardserve.audit.sources import load_source
from guardserve.exceptions import GuardserveError, InputError, ModelLoadError, PickleRefusedError, SettingsError
from guardserve.loading import example_input

HERE = Path(__file__)


def sound() -> nn.Module:
    """Build a model in eval mode."""
    return convolutional()[0]


def left_training() -> nn.Module:
    """Build a model and forget about eval mode."""
    return convolutional()[0].train()


@example_input(torch.zeros(1, 3, 12, 12))
def declared() -> nn.Module:
    """Build a model with a declared example."""
    return residual()[0]


@example_input(x=torch.zeros(1, 5), category=torch.full((1,), 3))
def declared_by_name() -> nn.Module:
    """Build a model of two inputs, one of which must be an index."""
    return Tabular().eval()


@example_input(torch.zeros(1, 5, dtype=torch.int64))
def of_numbers() -> nn.Module:
    """Build a model of whole numbers, of whose example only the shape is known."""
    return ToTheLongest().eval()


class Divides(nn.Module):
    """Has no answer for a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Standardise each row."""
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


@example_input(torch.zeros(1, 5))
def standardising() -> nn.Module:
    """Build a model that must not be judged on a constant."""
    return Divides().eval()


def report(source: str, **options: Any) -> Any:
    """Load and audit."""
    return audit_subject(load_source(source, device="cpu", **options).subject)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this module one that a user could name."""
    monkeypatch.syspath_prepend(str(HERE.parent))


def test_a_factory_is_judged_with_the_flags_it_leaves() -> None:
    """No example is made up where none is declared."""
    assert not report("test_sources:sound").findings
    trained = report("test_sources:left_training")
    assert codes(trained) == {"BN001"}
    assert "BN102" not in trained.ran


def test_a_factory_is_located_in_its_file() -> None:
    """For annotations in a review."""
    source = load_source("test_sources:left_training", device="cpu")
    assert source.path is not None
    assert source.path.name == "test_sources.py"
    assert source.line is not None
    assert HERE.read_text().splitlines()[source.line - 1].startswith("def left_training")
    assert load_source("test_sources:Divides", device="cpu").line is not None


def test_a_declared_example_is_used_for_its_shape_and_its_integers() -> None:
    """Zeros declare a shape, and no model is judged on them; an index stays as it was declared."""
    assert {"BN102", "BN105"} <= set(report("test_sources:declared").ran)
    assert not hits(report("test_sources:standardising"), "BN105")
    assert "BN102" in report("test_sources:declared_by_name").ran


def test_whole_numbers_that_are_all_zero_are_made_up_too() -> None:
    """In rows of several lengths, on which a model that mixes them shows itself."""
    assert hits(report("test_sources:of_numbers"), "BN102")


def test_an_example_of_a_given_shape_is_made_up() -> None:
    """For models that declare none, and in place of what is declared."""
    assert "BN102" in report("test_sources:sound", input_shapes=["3,9,9"]).ran
    assert "BN102" in report("test_sources:declared", input_shapes=["image=3,20,20"]).ran
    with pytest.raises(GuardserveError, match="there is no input 'other'"):
        load_source("test_sources:declared", input_shapes=["other=3,20,20"])
    with pytest.raises(SettingsError, match="is not a dtype"):
        load_source("test_sources:declared", input_dtypes=["float99"])


def test_an_example_file_comes_before_everything_else(tmp_path: Path) -> None:
    """Eight rows of it make every probe possible."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32))
    assert "BN106" in report("test_sources:declared", example=tmp_path / "rows.npy").ran


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_arrays_by_input_name(suffix: str, tmp_path: Path) -> None:
    """Several inputs are given by the names of the forward's parameters."""
    path = tmp_path / f"rows.{suffix}"
    arrays = {"x": np.ones((8, 5), np.float32), "category": np.arange(8)}
    if suffix == "npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    assert set(load_example(path)) == {"x", "category"}
    assert "BN102" in report("test_sources:declared_by_name", example=path).ran


def test_one_array_or_numbered_ones_need_no_names(tmp_path: Path) -> None:
    """A file of one array is the one input; numpy numbers what it is not told the names of."""
    np.savez(tmp_path / "one.npz", whatever=np.ones((2, 3)))
    assert load_example(tmp_path / "one.npz").shape == (2, 3)
    np.savez(tmp_path / "two.npz", *[np.full((2,), n) for n in range(11)])
    assert [int(tensor[0]) for tensor in load_example(tmp_path / "two.npz")] == list(range(11))


def test_an_example_file_runs_no_code(tmp_path: Path) -> None:
    """Pickled arrays, damaged and missing files are refused with their name."""
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for name in ("objects.npy", "bad.npy", "none.npz", "none.safetensors"):
        with pytest.raises(InputError, match=name):
            load_example(tmp_path / name)


@pytest.mark.parametrize("nest", [None, "state_dict"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_of_weights_are_judged_by_their_numbers(suffix: str, nest: str | None, tmp_path: Path) -> None:
    """Plain, or nested among other things of a checkpoint."""
    model, _ = convolutional()
    model.get_buffer("1.running_var")[0] = -1
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        state = {nest: model.state_dict(), "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
        torch.save(model.state_dict() if nest is None else state, path)
    name = f"{nest}.1" if nest and suffix == "pt" else "1"
    assert [(finding.code, finding.module) for finding in report(str(path)).findings] == [("BN006", name)]


def test_weights_are_put_into_a_factorys_model(tmp_path: Path) -> None:
    """And judged there; for a file they make no sense."""
    model, _ = convolutional()
    model.get_buffer("1.running_var")[0] = -1
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert codes(report("test_sources:sound", weights=tmp_path / "w.safetensors")) == {"BN006"}
    with pytest.raises(ModelLoadError, match="leave them out"):
        load_source(str(tmp_path / "w.safetensors"), weights=tmp_path / "w.safetensors")


def test_programs_in_files(tmp_path: Path) -> None:
    """An exported program brings the shapes of its inputs, TorchScript needs to be told."""
    model, example = convolutional()
    with silence():
        torch.export.save(exported(model, example), tmp_path / "model.pt2")
        torch.jit.save(traced(model.train(), example), tmp_path / "model.pt")
    program = report(str(tmp_path / "model.pt2"))
    assert "BN102" in program.ran
    assert not program.findings
    script = report(str(tmp_path / "model.pt"))
    assert codes(script) == {"BN003"}
    assert "BN102" not in script.ran
    assert {"BN003", "BN102", "BN103"} <= codes(report(str(tmp_path / "model.pt"), input_shapes=["3,12,12"]))


def test_a_pickled_module_needs_to_be_allowed(tmp_path: Path) -> None:
    """Loading it runs code from the file."""
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tmp_path / "model.pt")
    with pytest.raises(PickleRefusedError, match="--allow-pickle"):
        load_source(str(tmp_path / "model.pt"))
    assert "BN001" in codes(report(str(tmp_path / "model.pt"), allow_pickle=True))


def test_files_that_hold_nothing_to_audit(tmp_path: Path) -> None:
    """Missing, empty, damaged and foreign files say so."""
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    for name in ("list.pt", "empty.pt", "bad.safetensors", "none.pt", "none.onnx"):
        with pytest.raises(ModelLoadError, match=re.escape(name)):
            load_source(str(tmp_path / name))


def test_the_demo_and_devices() -> None:
    """Short names are known, and a device that is not there is told."""
    assert codes(report("demo")) == {"BN001"}
    with pytest.raises(SettingsError, match="device"):
        load_source("demo", device="abacus")


def test_an_example_in_double_precision_is_converted_and_told(tmp_path: Path) -> None:
    """Numpy's own type, in any byte order, is what most files hold."""
    for dtype in (np.float64, ">f8"):
        np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(dtype))
        found = report("test_sources:declared", example=tmp_path / "rows.npy")
        assert "BN102" in found.ran
        assert found.subject.endswith("run on an example converted from float64 to float32")


def test_an_example_for_what_cannot_be_run_is_told(tmp_path: Path) -> None:
    """A state_dict has no code, and the example goes unused: that is not what was asked for."""
    save_file(convolutional()[0].state_dict(), tmp_path / "w.safetensors")
    np.save(tmp_path / "rows.npy", np.zeros((2, 3, 12, 12), np.float32))
    weights = str(tmp_path / "w.safetensors")
    assert report(weights).refusal is None
    for options in ({"example": tmp_path / "rows.npy"}, {"input_shapes": ["3,12,12"]}):
        found = report(weights, **options)
        assert found.refusal is not None
        assert "the example was not used" in found.refusal
        assert "not known to be safe" in found.verdict


def test_names_that_no_input_has_are_told(tmp_path: Path) -> None:
    """By name, with those that there are."""
    np.savez(tmp_path / "rows.npz", x=np.ones((8, 5), np.float32), category=np.arange(8), label=np.arange(8))
    with pytest.raises(InputError, match="the example has 'label', which the forward does not take"):
        report("test_sources:declared_by_name", example=tmp_path / "rows.npz")
