"""Code that has changed since it was imported is not taken for what its files say."""

from __future__ import annotations

import gc
import importlib
import os
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
    """Nor the standard library: an upgrade beside a running server is none of a reload's business."""
    name = project("from torch import nn\nnet = nn.BatchNorm1d(3)")
    load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    found = dict(_sources())
    assert name in found
    assert not {"guardserve", "guardserve.loading", "torch", "json", "pytest"} & set(found)


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
