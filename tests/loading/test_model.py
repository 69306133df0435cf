"""Tests of guardserve.loading.model and guardserve.loading.files: any source, whole or damaged."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from guardserve.exceptions import GuardserveError, ModelLoadError, SettingsError
from guardserve.loading import load_model
from guardserve.loading.model import ALIASES


@pytest.mark.parametrize("name", ["net", "Net-2.1_b", "."])
def test_a_name_may_be_given(tiny_reference: str, name: str) -> None:
    """It replaces the one from the source."""
    assert load_model(tiny_reference, device="cpu", name=name).name == name


@pytest.mark.parametrize("name", ["", "my model", "a/b", "café", "net\n"])
def test_a_name_that_would_not_fit_a_path_is_refused(tiny_reference: str, name: str) -> None:
    """The error shows the name and the flag that sets it."""
    with pytest.raises(ModelLoadError, match=r"cannot be a model's name.*choose one with --name"):
        load_model(tiny_reference, device="cpu", name=name)


def test_a_file_whose_stem_is_no_name_asks_for_one(scripted: Path, tmp_path: Path) -> None:
    """The stem is the default name of a file; where it cannot be one, --name helps."""
    path = scripted.rename(tmp_path / "my model.v2.pt")
    with pytest.raises(ModelLoadError, match=r"'my model\.v2' cannot be a model's name"):
        load_model(str(path), device="cpu", input_shapes=["3,8,8"])
    assert load_model(str(path), device="cpu", input_shapes=["3,8,8"], name="mine").name == "mine"


def test_demo_is_an_alias(project: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The word demo stands for a factory, whose name it takes; the model remembers what the user named."""
    name = project("from torch import nn\ndef digits(): return nn.BatchNorm1d(3)")
    monkeypatch.setitem(ALIASES, "demo", f"{name}:digits")
    loaded = load_model("demo", device="cpu", input_shapes=["3"])
    assert (loaded.name, loaded.source) == ("digits", "demo")


def test_flags_override_what_the_factory_declares(tiny_reference: str) -> None:
    """The user has the last word about shapes and dtypes."""
    loaded = load_model(tiny_reference, device="cpu", input_shapes=["image=3,-1,-1"], input_dtypes=["float64"])
    assert loaded.inputs[0].shape == (-1, 3, -1, -1)
    assert loaded.inputs[0].dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [{"device": "gpu"}, {"input_shapes": ["x"]}, {"input_dtypes": ["x"]}],
    ids=lambda options: next(iter(options)),
)
def test_values_are_checked_before_anything_is_loaded(options: dict[str, object]) -> None:
    """A wrong setting is told at once, not after a minute of loading."""
    with pytest.raises(SettingsError):
        load_model("no_such_module:net", **{"device": "cpu", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["factory", "export", "torchscript"])
def test_a_model_loaded_in_inference_mode_is_an_ordinary_one(
    kind: str, tiny_reference: str, exported: Path, scripted: Path
) -> None:
    """Its parameters can be updated and its buffers restored, wherever load_model was called."""
    source = {"factory": tiny_reference, "export": str(exported), "torchscript": str(scripted)}[kind]
    with torch.inference_mode():
        module = load_model(source, device="cpu", input_shapes=["3,8,8"]).module
    tensors = [*module.parameters(), *module.buffers()]
    assert len(tensors) == 9
    assert not any(tensor.is_inference() for tensor in tensors)


def test_a_model_built_in_inference_mode_is_refused(project: Callable[[str], str]) -> None:
    """Nothing can make its tensors ordinary ones; the error says how to build it."""
    name = project("""
        import torch

        @torch.inference_mode()
        def net():
            return torch.nn.BatchNorm1d(3)
    """)
    with pytest.raises(ModelLoadError, match=r"built under torch\.inference_mode\(\)"):
        load_model(f"{name}:net", device="cpu", input_shapes=["3"])


def test_a_model_that_cannot_be_moved_is_refused(project: Callable[[str], str]) -> None:
    """A model on the meta device has no values to move."""
    name = project("from torch import nn\ndef net(): return nn.BatchNorm1d(3, device='meta')")
    with pytest.raises(ModelLoadError, match="cannot be moved to cpu: Cannot copy out of meta tensor"):
        load_model(f"{name}:net", device="cpu", input_shapes=["3"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"", "is empty"),
        ("model.pt", b"\0", "is none of these: torch.export archive, TorchScript program"),
        ("model.pt", b"hello world" * 30, "truncated or damaged"),
        ("model.pth", b"PK\x03\x04" + bytes(64), "is a damaged or truncated zip archive"),
        ("model.zip", b"PK\x05\x06" + bytes(18), "is none of these"),
        ("model.pkl", b"\x80\x04\x95", "is none of these"),
        ("model.onnx", b"\x08\x07\x12\x04test", r"can be audited \(guardserve audit .*model\.onnx\), but not served"),
        ("model.safetensors", b"hello world", "is a damaged or truncated safetensors file"),
    ],
)
def test_a_file_of_no_known_kind_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The error names the file and what it might have been."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"{path}.*{message}"):
        load_model(str(path), device="cpu", input_shapes=["3"])


def test_programs_of_old_torch_are_refused(tmp_path: Path) -> None:
    """They consist of pickles; the remedy is to export again."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(ModelLoadError, match=r"torch 2\.7 and before.*export the model again"):
        load_model(str(path), device="cpu")


def test_a_directory_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    """The error says which of the two it is."""
    with pytest.raises(ModelLoadError, match=f"{tmp_path} is a directory"):
        load_model(str(tmp_path), device="cpu")
    with pytest.raises(ModelLoadError, match=r"there is no file '.*gone\.pt'"):
        load_model(str(tmp_path / "gone.pt"), device="cpu")
    with pytest.raises(ModelLoadError, match=r"there is no file '.*gone\.pt'"):
        load_model("torch.nn:Identity", weights=tmp_path / "gone.pt", device="cpu")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20))
@example("")
@example("a\0b.pt")
@example("x" * 5000)
@example("x" * 300 + ":net")
@example("models/net.py:make")
@example("models.net:")
@example(":net")
@example("a..b:c")
def test_any_text_for_a_source_gives_a_clear_error(source: str) -> None:
    """Whatever is typed, nothing but the package's own error comes out."""
    if Path(source[:200].replace("\0", "")).exists():
        return
    with pytest.raises(ModelLoadError):
        load_model(source, device="cpu")


def scripted_bytes(model: nn.Module) -> bytes:
    """Return a TorchScript file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
        torch.jit.save(torch.jit.script(model), buffer)
    return buffer.getvalue()


def checkpoint_bytes(model: nn.Module, *, legacy: bool) -> bytes:
    """Return a file of weights, in the zip format or in the one before it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["export", "torchscript", "checkpoint", "legacy checkpoint", "safetensors"])
def model_file(request: pytest.FixtureRequest, exported_bytes: bytes) -> bytes:
    """Give a whole model file of each kind."""
    if request.param == "export":
        return exported_bytes
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).eval()
    if request.param == "torchscript":
        return scripted_bytes(model)
    if request.param == "safetensors":
        return safetensors.torch.save(model.state_dict())
    return checkpoint_bytes(model, legacy=request.param == "legacy checkpoint")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
@example(0.0)
def test_a_truncated_file_gives_a_clear_error(model_file: bytes, tmp_path: Path, part: float) -> None:
    """Cut off anywhere, it is refused with an error of the package that names the file."""
    path = tmp_path / "cut.bin"
    path.write_bytes(model_file[: int(len(model_file) * part)])
    with pytest.raises(ModelLoadError, match=r"cut\.bin"):
        load_model(str(path), device="cpu", input_shapes=["3"])


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_loads_or_gives_a_clear_error(
    model_file: bytes, tmp_path: Path, damage: list[tuple[float, int]]
) -> None:
    """With bytes changed anywhere, no error of a library comes out; a weight may simply have become another one."""
    data = bytearray(model_file)
    for place, value in damage:
        data[int(len(data) * place)] = value
    path = tmp_path / "damaged.bin"
    path.write_bytes(data)
    message = ""
    try:
        load_model(str(path), device="cpu")
    except GuardserveError as error:
        message = str(error)
    assert "\n" not in message
