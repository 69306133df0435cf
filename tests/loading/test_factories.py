"""Tests of guardserve.loading.factories."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from guardserve.exceptions import ModelLoadError
from guardserve.loading import load_model

Project = Callable[[str], str]


def test_a_factory_in_the_working_directory_is_found(tiny_reference: str) -> None:
    """A module that is not installed is imported from the working directory; its inputs come from its example."""
    loaded = load_model(tiny_reference, device="cpu")
    assert loaded.name == "net"
    assert loaded.platform == "pytorch_eager"
    assert loaded.source == tiny_reference
    assert loaded.device == torch.device("cpu")
    assert [(spec.name, spec.shape) for spec in loaded.inputs] == [("image", (-1, 3, 8, 8))]
    assert loaded.module(loaded.inputs[0].example(2)).shape == (2, 2)


def test_training_flags_are_left_as_the_factory_left_them(project: Project) -> None:
    """Putting the model in eval mode is the guard's work, and giving each flag back as well."""
    name = project("""
        from torch import nn

        def mixed():
            model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
            model[1].eval()
            return model
    """)
    module = load_model(f"{name}:mixed", device="cpu", input_shapes=["3"]).module
    assert [layer.training for layer in module.modules()] == [True, True, False]


def test_the_import_path_is_left_as_it_was(tiny_reference: str, tmp_path: Path) -> None:
    """The working directory is on it for the load alone, also when that fails."""
    before = list(sys.path)
    assert str(tmp_path) not in before
    load_model(tiny_reference, device="cpu")
    with pytest.raises(ModelLoadError):
        load_model("nowhere:net")
    assert sys.path == before


def test_a_factory_may_import_from_the_working_directory_when_it_is_called(project: Project) -> None:
    """Imports within the factory's body find what those of its module find."""
    other = project("from torch import nn\nmodel = nn.BatchNorm1d(3)")
    name = project(f"""
        def net():
            import {other}
            return {other}.model
    """)
    assert isinstance(load_model(f"{name}:net", device="cpu", input_shapes=["3"]).module, nn.BatchNorm1d)


@pytest.mark.parametrize("path", ["Net", "NET", "Builders.make", "Builders.Inner.net"])
def test_classes_modules_and_attributes_of_attributes_are_factories(project: Project, path: str) -> None:
    """Whatever gives an nn.Module without arguments will do, or is one."""
    name = project("""
        from torch import nn

        class Net(nn.BatchNorm1d):
            def __init__(self, features=3):
                super().__init__(features)

        NET = Net()

        class Builders:
            make = staticmethod(lambda *args, **kwargs: Net())

            class Inner:
                net = Net
    """)
    loaded = load_model(f"{name}:{path}", device="cpu", input_shapes=["3"])
    assert type(loaded.module).__name__ == "Net"
    assert loaded.name == path.rpartition(".")[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_package:net", "there is no module 'no_such_package', neither installed nor in "),
        ("torch.no_such_module:net", r"there is no module 'torch\.no_such_module'"),
        ("torch.nn:Modul", r"torch\.nn has no attribute 'Modul'; did you mean .*Module"),
        ("torch.nn:Module.zzzzzzzz", r"Module has no attribute 'zzzzzzzz'$"),
        ("torch:__version__", "is a TorchVersion: name a function, an nn.Module class or an nn.Module"),
        ("torch.nn:Linear", r"needs arguments \(in_features, out_features\), but a factory is called without"),
        ("builtins:dict", "returned a dict, not a torch.nn.Module"),
        ("torch.nn:ModuleList", "ModuleList has no forward"),
    ],
)
def test_what_is_no_factory_is_refused(source: str, message: str) -> None:
    """The error names the source, what is wrong with it, and names near to a wrong one."""
    with pytest.raises(ModelLoadError, match=message):
        load_model(source, device="cpu", input_shapes=["3"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_dependency", "failed: No module named 'no_such_dependency'; install what is missing"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def net(:", "failed: SyntaxError"),
        ("import sys; sys.exit(2)", "failed: SystemExit: 2"),
        ("def net(): raise KeyError('layers')", "raised KeyError: 'layers'"),
        ("def net(): raise SystemExit(3)", "raised SystemExit: 3"),
        ("def __getattr__(name): raise RuntimeError('lazy')", "RuntimeError: lazy"),
    ],
)
def test_a_failure_in_the_users_code_is_named_and_chained(project: Project, body: str, message: str) -> None:
    """The message says what failed, and the traceback of the user's own code is kept for them."""
    name = project(body)
    with pytest.raises(ModelLoadError, match=f"{name}:net.*{message}") as caught:
        load_model(f"{name}:net", device="cpu")
    assert caught.value.__cause__ is not None


def test_an_input_that_is_not_declared_is_asked_for(project: Project) -> None:
    """The error names both remedies: the decorator and the flag."""
    name = project("from torch import nn\ndef net(): return nn.BatchNorm1d(3)")
    with pytest.raises(ModelLoadError, match=r"'input' is not known: .*@example_input.*--input-shape input="):
        load_model(f"{name}:net", device="cpu")


def test_the_factorys_example_comes_before_the_models(project: Project) -> None:
    """The factory knows better than the class what its model takes."""
    name = project("""
        import torch
        from guardserve.loading import example_input

        @example_input(torch.zeros(1, 3))
        class Net(torch.nn.BatchNorm1d):
            def __init__(self):
                super().__init__(3)

        @example_input(torch.zeros(1, 3, 9))
        def net():
            return Net()
    """)
    assert load_model(f"{name}:Net", device="cpu").inputs[0].shape == (-1, 3)
    assert load_model(f"{name}:net", device="cpu").inputs[0].shape == (-1, 3, 9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_factory_may_give_a_torchscript_module(project: Project) -> None:
    """It is served as what it is."""
    name = project("""
        import torch

        def net():
            return torch.jit.script(torch.nn.BatchNorm1d(3))
    """)
    loaded = load_model(f"{name}:net", device="cpu", input_shapes=["3"])
    assert loaded.platform == "pytorch_torchscript"
    assert loaded.inputs[0].name == "input"
