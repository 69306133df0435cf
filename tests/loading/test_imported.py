"""Code that has changed since it was imported is not taken for what its files say."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guardserve.cli.serve import _again, _runtime
from guardserve.exceptions import ModelLoadError
from guardserve.loading import load_model
from guardserve.loading.imported import ImportedCode, _sources
from guardserve.settings import ServeSettings

Project = Callable[[str], str]

MODULE = """
    from torch import nn
    from {layers} import Norm
    net = lambda: Norm(3)
"""


def test_a_change_of_a_module_or_of_what_it_imports_is_found(project: Project, tmp_path: Path) -> None:
    """By its content: a file that is only written again is as it was, and one that is gone is not."""
    layers = project("from torch import nn\nclass Norm(nn.BatchNorm1d): pass")
    name = project(MODULE.format(layers=layers))
    load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    code = ImportedCode()
    for changed in (layers, name):
        file = tmp_path / f"{changed}.py"
        before = file.read_text()
        os.utime(file, (1, 1))
        code.check()
        file.write_text(before + "# changed\n")
        with pytest.raises(ModelLoadError, match=rf"the code of {changed} \({changed}\.py\) has changed") as caught:
            code.check()
        assert str(tmp_path) not in str(caught.value)
        file.write_text(before)
        code.check()
    (tmp_path / f"{layers}.py").unlink()
    with pytest.raises(ModelLoadError, match=layers):
        code.check()


def test_another_release_behind_a_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deployments often turn a link round, and leave the files of the release before as they were."""
    link = tmp_path / "current"
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "linked_code.py").write_text(f"release = {number}")
    link.symlink_to(tmp_path / "1")
    monkeypatch.syspath_prepend(link)
    monkeypatch.setitem(sys.modules, "linked_code", importlib.import_module("linked_code"))
    code = ImportedCode()
    code.check()
    link.unlink()
    link.symlink_to(tmp_path / "2")
    with pytest.raises(ModelLoadError, match="linked_code"):
        code.check()


def test_what_is_imported_later_is_remembered_from_then_on(project: Project, tmp_path: Path) -> None:
    """As by a factory that imports when it is called."""
    code = ImportedCode()
    name = project("from torch import nn\nnet = nn.BatchNorm1d(3)")
    load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    code.check()
    (tmp_path / f"{name}.py").write_text("net = None")
    with pytest.raises(ModelLoadError, match=name):
        code.check()


def test_installed_packages_and_the_servers_own_code_are_not_the_users(project: Project) -> None:
    """Nor the standard library: their files are not read one by one."""
    name = project("from torch import nn\nnet = nn.BatchNorm1d(3)")
    load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    found = dict(_sources())
    assert name in found
    assert not {"guardserve", "guardserve.loading", "torch", "json", "pytest"} & set(found)


def install(folder: Path, name: str, version: str, content: str = "") -> None:
    """Install a package of one module, as pip does: what was there of it is gone, the other packages stay."""
    for old in folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    (folder / f"{name}.py").write_text(content)
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "RECORD").write_text(f"{name}.py,sha256={hash(content)},{len(content)}\n{about.name}/METADATA,,\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder to install into, with one package that is imported and one that is not."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "layers_in_use", "1.0")
    install(folder, "layers_aside", "1.0")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "layers_in_use", importlib.import_module("layers_in_use"))
    return folder


@pytest.mark.parametrize(
    ("version", "content", "says"),
    [
        ("2.0", "", r"layers_in_use 1\.0 was replaced by 2\.0"),
        ("1.0", "rebuilt = True", r"another build of layers_in_use 1\.0 was installed"),
        (None, "", r"layers_in_use 1\.0 was uninstalled"),
    ],
)
def test_a_package_that_was_installed_anew_since_its_import_is_found(
    packages: Path, version: str | None, content: str, says: str
) -> None:
    """By its version or its files, but only one of those in use; back in its place it is as it was."""
    code = ImportedCode()
    install(packages, "layers_aside", "7.0")
    code.check()
    if version is None:
        shutil.rmtree(packages / "layers_in_use-1.0.dist-info")
    else:
        install(packages, "layers_in_use", version, content)
    with pytest.raises(ModelLoadError, match=f"{says}.*start the server again"):
        code.check()
    install(packages, "layers_in_use", "1.0")
    code.check()


def test_a_package_is_remembered_from_its_import_on(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a factory that imports when it is called; one half removed is passed over."""
    (packages / "layers_lost-1.0.dist-info").mkdir()
    (packages / "layers_lost-1.0.dist-info" / "RECORD").write_text("layers_in_use.py,,\n")
    code = ImportedCode()
    install(packages, "layers_aside", "2.0")
    monkeypatch.setitem(sys.modules, "layers_aside", importlib.import_module("layers_aside"))
    code.check()
    install(packages, "layers_aside", "3.0")
    with pytest.raises(ModelLoadError, match=r"layers_aside 2\.0 was replaced by 3\.0"):
        code.check()


def test_processes_that_run_the_same_code_remember_the_same(packages: Path, project: Project, tmp_path: Path) -> None:
    """And one that was started after a change does not."""
    name = project("from torch import nn\nnet = nn.BatchNorm1d(3)")
    load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    known = ImportedCode().known
    assert known == ImportedCode().known
    assert {f"the code of {name}", "package torch", "package layers_in_use"} <= known.keys()
    (tmp_path / f"{name}.py").write_text("net = None")
    install(packages, "layers_in_use", "1.1")
    now = ImportedCode().known
    assert {key for key in known if known[key] != now[key]} == {f"the code of {name}", "package layers_in_use"}


def test_a_model_is_not_loaded_again_with_code_that_has_changed(project: Project, tmp_path: Path) -> None:
    """The server would answer with new weights in an old model, and say that it had reloaded."""
    name = project("from torch import nn\ndef net():\n    return nn.BatchNorm1d(3)")
    settings, reference = ServeSettings.model_validate({"input_shape": ["3"]}), f"{name}:net"
    served = _runtime(settings, reference)
    code = ImportedCode()
    try:
        _again(settings, reference, code, served).close()
        (tmp_path / f"{name}.py").write_text("from torch import nn\ndef net():\n    return nn.BatchNorm1d(3, eps=1.0)")
        with pytest.raises(ModelLoadError, match="start the server again"):
            _again(settings, reference, code, served)
    finally:
        gc.unfreeze()
        served.close()
