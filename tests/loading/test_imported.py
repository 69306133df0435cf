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
    import_here(monkeypatch, "linked_code")
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


def import_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Import a module for the time of one test."""
    monkeypatch.setitem(sys.modules, name, sys)
    del sys.modules[name]
    importlib.invalidate_caches()
    importlib.import_module(name)


def install(folder: Path, name: str, version: str, content: str = "") -> None:
    """Install a package of one module, as pip does: what was there of it is gone, the other packages stay."""
    called = name.replace("/", "_")
    for old in folder.glob(f"{called}-*.dist-info"):
        shutil.rmtree(old)
    (folder / f"{name}.py").write_text(content)
    about = folder / f"{called}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {called}\nVersion: {version}\n")
    (about / "RECORD").write_text(
        f"{about.name}/METADATA,,\n{about.name}/RECORD,{version},\n{name}.py,sha256={hash(content)},{len(content)}\n"
    )


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder to install into, with one package that is imported and one that is not."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "layers_in_use", "1.0")
    install(folder, "layers_aside", "1.0")
    monkeypatch.syspath_prepend(folder)
    import_here(monkeypatch, "layers_in_use")
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
    import_here(monkeypatch, "layers_aside")
    code.check()
    install(packages, "layers_aside", "3.0")
    with pytest.raises(ModelLoadError, match=r"layers_aside 2\.0 was replaced by 3\.0"):
        code.check()


def test_what_another_release_has_left_behind_is_no_change(packages: Path) -> None:
    """It is asked of the same one, at the import and later."""
    left = packages / "layers_in_use-0.9.dist-info"
    left.mkdir()
    (left / "METADATA").write_text("Metadata-Version: 2.1\nName: layers_in_use\nVersion: 0.9\n")
    code = ImportedCode()
    assert "package layers_in_use" in code.known
    code.check()


def test_of_packages_that_share_a_namespace_only_those_in_use_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new release of another one is no reason not to load the model again."""
    folder = tmp_path / "site-packages"
    (folder / "shared_name").mkdir(parents=True)
    for part in ("used", "unused"):
        install(folder, f"shared_name/{part}", "1.0")
    monkeypatch.syspath_prepend(folder)
    for name in ("shared_name", "shared_name.used"):
        import_here(monkeypatch, name)
    code = ImportedCode()
    assert {name for name in code.known if "shared" in name} == {"package shared_name_used"}
    install(folder, "shared_name/unused", "2.0")
    code.check()
    install(folder, "shared_name/used", "2.0")
    with pytest.raises(ModelLoadError, match=r"shared_name_used 1\.0 was replaced by 2\.0"):
        code.check()


def test_a_package_whose_installer_wrote_no_list_of_files_is_known_by_its_modules(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of Linux distributions are; each of its modules may be a file or a folder."""
    for name in ("listed_folder", "listed_file", "listed_aside"):
        about = packages / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "top_level.txt").write_text(f"{name}\n")
    (packages / "listed_folder").mkdir()
    for file in ("listed_folder/__init__.py", "listed_file.py", "listed_aside.py"):
        (packages / file).touch()
    for name in ("listed_folder", "listed_file"):
        import_here(monkeypatch, name)
    assert {name for name in ImportedCode().known if "listed" in name} == {
        "package listed_folder",
        "package listed_file",
    }


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
