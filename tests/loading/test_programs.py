"""Tests of guardserve.loading.programs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from guardserve.exceptions import ModelLoadError, SettingsError
from guardserve.loading import load_model
from guardserve.signature import TensorSpec


def export(path: Path, model: nn.Module, *args: Any, decompose: bool = False, **options: Any) -> str:
    """Export a model to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns of what torch does itself
        program = torch.export.export(model, args, **options)
        torch.export.save(program.run_decompositions() if decompose else program, path)
    return str(path)


def test_an_exported_program_gives_its_inputs(exported: Path, tiny: nn.Module) -> None:
    """A dynamic dimension is free, the others are as exported; the outputs are the model's."""
    loaded = load_model(str(exported), device="cpu")
    assert loaded.platform == "pytorch_export"
    assert loaded.name == "tiny"
    assert loaded.inputs == (TensorSpec("image", torch.float32, (-1, 3, 8, 8)),)
    images = loaded.inputs[0].example(3)
    torch.testing.assert_close(loaded.module(images), tiny(images))


def test_the_suffix_does_not_decide(exported: Path, scripted: Path, tmp_path: Path) -> None:
    """A file is what its content is."""
    program = exported.rename(tmp_path / "program.bin")
    assert load_model(str(program), device="cpu").platform == "pytorch_export"
    script = scripted.rename(tmp_path / "script.pt2")
    assert load_model(str(script), device="cpu", input_shapes=["3,8,8"]).platform == "pytorch_torchscript"


def test_sizes_that_the_export_fixed_are_still_checked(exported: Path) -> None:
    """The guards that torch would make from text in the archive are left out, but not the check of sizes."""
    module = load_model(str(exported), device="cpu").module
    with pytest.raises(RuntimeError, match=r"shape\[2\] to be equal to 8, but got 9"):
        module(torch.zeros(2, 3, 9, 8))


def test_flags_must_agree_with_the_program(exported: Path) -> None:
    """A shape or a dtype that contradicts the program is refused, one that agrees is taken."""
    assert load_model(str(exported), device="cpu", input_shapes=["3,8,8"]).inputs[0].shape == (-1, 3, 8, 8)
    with pytest.raises(SettingsError, match=r"\(3, 9, 8\) for 'image': the program was exported for \(3, 8, 8\)"):
        load_model(str(exported), device="cpu", input_shapes=["image=3,9,8"])


class Odd(nn.Module):
    """A net whose program holds what a plain one does not: shape arithmetic, odd names, strings, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"3x3-conv": nn.Conv2d(3, 4, 3, stride=2), "norm:0": nn.BatchNorm2d(4)})
        self.scale = nn.Buffer(torch.ones(4))

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """Return nested outputs."""
        x = image
        for block in self.blocks.values():
            x = block(x)
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = x[..., : x.shape[-2] // 2, : (x.shape[-1] + 1) // 3]
        pairs = torch.einsum("bchw,bc->bhw", x, self.scale.expand(x.shape[0], -1))
        with torch.no_grad(), torch.autocast("cpu"):
            product = pairs @ pairs.mT
        chosen = torch.cond(ids.sum() > 0, torch.sin, torch.cos, (pairs.mean((1, 2)),))
        return {"logits": chosen.to(torch.float16), "rest": [product, torch.zeros(x.shape[0])]}


def test_programs_with_shape_arithmetic_and_odd_names_load(tmp_path: Path) -> None:
    """The inspection lets through what exporters write for real models."""
    torch.manual_seed(0)
    model, image, ids = Odd().eval(), torch.randn(2, 3, 32, 40), torch.ones(2, dtype=torch.int64)
    shapes = {"image": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "ids": {0: Dim.AUTO}}
    path = export(tmp_path / "odd.pt2", model, image, ids, dynamic_shapes=shapes)
    loaded = load_model(path, device="cpu")
    assert loaded.inputs == (
        TensorSpec("image", torch.float32, (-1, 3, -1, -1)),
        TensorSpec("ids", torch.int64, (-1,)),
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(image, ids), model(image, ids))
        other = torch.randn(3, 3, 20, 24)
        torch.testing.assert_close(loaded.module(other, ids.new_zeros(3)), model(other, ids.new_zeros(3)))


def test_a_decomposed_program_loads(tmp_path: Path, tiny: nn.Module) -> None:
    """Programs lowered to core operators are programs as well."""
    loaded = load_model(export(tmp_path / "core.pt2", tiny, torch.zeros(1, 3, 8, 8), decompose=True), device="cpu")
    assert loaded.inputs[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(loaded.module(torch.ones(1, 3, 8, 8)), tiny(torch.ones(1, 3, 8, 8)))


class Nested(nn.Module):
    """A net that takes a pair."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Add the two."""
        return pair[0] + pair[1]


class Optional(nn.Module):
    """A net with an input that may be None."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the input."""
        return x * 2 if mask is None else x * mask


class Scaled(nn.Module):
    """A net that takes a scalar tensor."""

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Scale the input."""
        return x * factor


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "message"),
    [
        (Nested(), ((torch.ones(2), torch.ones(2)),), None, "by keyword or nested"),
        (Optional(), (), {"x": torch.ones(2)}, "by keyword or nested"),
        (Optional(), (torch.ones(2), None), None, "an input that is not a tensor"),
        (Scaled(), (torch.ones(2), torch.tensor(2.0)), None, "'factor' of the exported program is a scalar"),
        (Scaled(), (torch.ones(2), torch.ones(2) * 1j), None, "'factor' has dtype torch.complex64"),
    ],
    ids=["nested", "keyword", "none", "scalar", "complex"],
)
def test_a_program_that_requests_cannot_call_is_refused(
    tmp_path: Path, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, message: str
) -> None:
    """Requests pass tensors by position with the batch first."""
    path = export(tmp_path / "model.pt2", model, *args, kwargs=kwargs)
    with pytest.raises(ModelLoadError, match=message):
        load_model(path, device="cpu")


def test_two_programs_in_one_archive_are_refused(tmp_path: Path, tiny: nn.Module) -> None:
    """Nothing says which of them is to be served."""
    from torch.export.pt2_archive._package import package_pt2  # noqa: PLC0415 - slow to import

    program = torch.export.export(tiny, (torch.zeros(1, 3, 8, 8),))
    path = str(tmp_path / "two.pt2")
    package_pt2(path, exported_programs={"a": program, "b": program})
    with pytest.raises(ModelLoadError, match=r"holds 2 programs \(a, b\), not one"):
        load_model(path, device="cpu")


def test_torchscript_loads_with_a_shape_and_without_a_warning(scripted: Path, tiny: nn.Module) -> None:
    """What torch says about TorchScript in general does not reach the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_model(str(scripted), device="cpu", input_shapes=["3,8,8"])
    assert not caught
    assert loaded.platform == "pytorch_torchscript"
    assert loaded.inputs == (TensorSpec("image", torch.float32, (-1, 3, 8, 8)),)
    assert not loaded.module.training
    images = loaded.inputs[0].example(3)
    torch.testing.assert_close(loaded.module(images), tiny(images))


def test_torchscript_without_a_shape_asks_for_it(scripted: Path) -> None:
    """The error names the flag and the input."""
    with pytest.raises(ModelLoadError, match="TorchScript does not record it; give --input-shape image="):
        load_model(str(scripted), device="cpu")


def test_a_trace_in_training_mode_keeps_its_flag(tmp_path: Path) -> None:
    """Loading judges nothing: that is for the guard and the audit."""
    path = tmp_path / "traced.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.BatchNorm1d(3), torch.randn(4, 3), check_trace=False), path)  # type: ignore[no-untyped-call]
    assert load_model(str(path), device="cpu", input_shapes=["3"]).module.training
