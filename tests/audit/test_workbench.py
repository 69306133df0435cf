"""The model is never altered: not by a probe, not by one that raises, not when it cannot be copied."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audit.models import BUILDS, Build, convolutional, noise, norms, reasons, residual
from audit.programs import exported, scripted, silence, traced
from torch import nn

from guardserve.audit import audit
from guardserve.audit.workbench import workbench

EXAMPLE = noise(8, 3, seed=2)


class Impure(nn.Module):
    """Alters everything that it can reach in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(3))
        self.scale: torch.Tensor
        self.plain = torch.zeros(3)
        self.calls: list[torch.Tensor] = []
        self.settings = {"alpha": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Alter."""
        self.train()
        self.linear.weight.data.mul_(0.5)
        self.scale += 1
        self.norm.running_mean = torch.full((3,), float("nan"))
        self.plain.add_(1)
        self.calls.append(x)
        self.settings["alpha"] += 1
        self.new = x
        self.register_forward_hook(lambda *_: None)
        self.drop = nn.Dropout(0.1)
        np.random.rand()  # noqa: NPY002
        random.random()
        y: torch.Tensor = self.drop(self.linear(x)) + torch.rand(3)
        return y


class Raising(Impure):
    """Raises when all is altered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Alter and raise."""
        super().forward(x)
        raise RuntimeError("boom")


class Uncopyable(Impure):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("one is enough")


class Locked(Impure):
    """Holds something that cannot be copied, and lists, objects and tensors in lists, which it alters."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.deep = {"a": {"v": [torch.zeros(3), 0]}}
        self.thing = SimpleNamespace(count=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Alter."""
        held: Any = self.deep["a"]["v"]
        held[0].add_(1)
        held[1] += 1
        self.thing.count += 1
        return super().forward(x)


class CopiesItself(Impure):
    """Gives itself for a copy."""

    def __deepcopy__(self, memo: object) -> CopiesItself:
        return self


def fingerprint(model: nn.Module) -> list[Any]:
    """Return all that must not change, in a comparable form."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    attributes = []
    for name, module in model.named_modules():
        for key, value in ({} if isinstance(module, torch.jit.ScriptModule) else vars(module)).items():
            held = list(value) if isinstance(value, (dict, list, set)) else None
            attributes.append((name, key, id(value), held))
    return [
        [(name, id(tensor) if not _script(model) else 0) for name, tensor in state.items()],
        [(name, tensor.detach().clone().nan_to_num(-99.0).tolist()) for name, tensor in state.items()],
        [tensor.grad is None for tensor in model.parameters()],
        [tensor.requires_grad for tensor in model.parameters()],
        [getattr(module, "training", None) for module in model.modules()],
        attributes,
        getattr(model, "plain", torch.zeros(1)).tolist(),
        dict(getattr(model, "settings", {})),
    ]


def _script(model: nn.Module) -> bool:
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


def randomness() -> list[Any]:
    """Return the state of every random generator."""
    return [random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()]  # noqa: NPY002


@pytest.mark.parametrize("kind", [Impure, Raising, Uncopyable, Locked, CopiesItself])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_alters_everything_alters_nothing(kind: type[Impure], training: bool) -> None:
    """Values, identities, flags, hooks, gradients, containers and random states are as before."""
    model = kind().train(training)
    model.norm.eval()
    before, random_before = fingerprint(model), randomness()
    audit(model, EXAMPLE)
    assert fingerprint(model) == before
    assert randomness() == random_before
    assert torch.is_grad_enabled()
    if isinstance(model, Locked):
        held: Any = model.deep["a"]["v"]
        assert (held[0].tolist(), held[1], model.thing.count) == ([0, 0, 0], 0, 0)


@pytest.mark.parametrize(("kind", "why"), [(Uncopyable, "TypeError: one is enough"), (CopiesItself, "its copy shares")])
def test_a_model_that_cannot_be_copied_is_not_run(kind: type[Impure], why: str) -> None:
    """The rules that run it say so, and so does the verdict; the others are checked."""
    report = audit(kind().eval(), EXAMPLE)
    for code in ("BN101", "BN102", "BN103", "BN104", "BN105", "BN106"):
        (reason,) = reasons(report, code)
        assert why in reason
        assert "running the model itself could alter it" in reason
    assert report.refusal is not None
    assert "not known to be safe" in report.verdict
    assert "BN004" in report.ran


@pytest.mark.parametrize("build", BUILDS)
def test_ordinary_models_are_not_altered(build: Build) -> None:
    """With gradients of a training step, in training mode, with a frozen layer."""
    model, example = build()
    model.train()
    norms(model)[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = fingerprint(model)
    audit(model, example)
    assert fingerprint(model) == before
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    "make",
    [
        traced,
        lambda model, _: scripted(model),
        lambda model, example: exported(model, example).module(),
        lambda model, _: torch.fx.symbolic_trace(model),
        lambda model, example: nn.Sequential(traced(model, example), nn.Softmax(1)),
    ],
    ids=["traced", "scripted", "exported", "symbolic", "inside"],
)
def test_programs_that_train_are_not_altered(make: Callable[[nn.Module, Any], nn.Module]) -> None:
    """Even a program in training mode has the statistics that it had."""
    model, example = convolutional()
    program = make(model.train(), example)
    before = fingerprint(program)
    audit(program, example)
    assert fingerprint(program) == before


def test_an_exported_program_keeps_its_state() -> None:
    """The module that is run shares its tensors."""
    model, example = convolutional()
    program = exported(model.train(), example)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    audit(program, example)
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in before.items())


def test_lazy_modules_stay_lazy() -> None:
    """Only the copy gets its first input, and is probed then."""
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    report = audit(model, EXAMPLE)
    assert isinstance(model[0], nn.LazyLinear)
    assert isinstance(model[1], nn.LazyBatchNorm1d)
    assert {"BN102", "BN103"} <= set(report.ran)
    assert not report.reaches("error")


def test_weights_normalised_the_old_way_are_run() -> None:
    """Their weight is an attribute that autograd made, which cannot be copied."""
    model, example = residual()
    with silence():
        torch.nn.utils.weight_norm(model.get_submodule("stem"))
        model(example)
    before = model.get_submodule("stem").weight
    report = audit(model, example)
    assert "BN102" in report.ran
    assert model.get_submodule("stem").weight is before


def test_each_run_starts_from_the_same_state() -> None:
    """What a forward leaves behind does not reach the next one, and is named."""
    model = Impure().eval()
    with workbench(model) as bench:
        runs = [bench.run((EXAMPLE,), {}) for _ in range(3)]
    assert torch.equal(runs[0].output, runs[2].output)
    assert set(runs[0].changed) == {
        "linear.weight",
        "scale",
        "plain",
        "norm.running_mean",
        "calls",
        "settings",
        "new",
        "drop.p",
    }
    assert runs[0].changed == runs[2].changed


def test_a_compiled_model_is_run_without_compiling() -> None:
    """Its own code is looked at, and its layers are named as it names them."""
    model, example = convolutional()
    subject: Any
    with silence():
        compiled: Any = torch.compile(model, backend=_refuse)
        first: Any = torch.compile(model.get_submodule("0"), backend=_refuse)
    inside = nn.Sequential(first, *list(model.children())[1:]).eval()
    for subject in (compiled, inside):
        report = audit(subject, example)
        assert not report.findings
        assert "BN102" in report.ran


def _refuse(*_: object) -> Any:
    raise AssertionError("compiled")
