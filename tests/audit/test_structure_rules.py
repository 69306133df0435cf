"""Rules on how a model is put together: BN010 to BN013 and BN015."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from audit.models import (
    BUILDS,
    Build,
    codes,
    convolutional,
    hits,
    norm_names,
    norms,
    reasons,
    residual,
    settled,
    tabular,
)
from audit.programs import exported, frozen, scripted, traced
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from guardserve import fuse
from guardserve.audit import Finding, audit

STRUCTURE = ("BN011", "BN012", "BN013")


class Functional(nn.Module):
    """Convolution, functional activation and dropout, BatchNorm, in an order that is not that of the children."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations."""
        y: torch.Tensor = self.norm(F.relu(self.conv(F.dropout(x, self.p, training=self.training))))
        return y


class Untraceable(Functional):
    """The same, with control flow that depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations."""
        y = self.conv(F.dropout2d(x, self.p, training=self.training))
        y = torch.tanh(y) if float(y.detach().mean()) > -9 else y
        normalised: torch.Tensor = self.norm(y)
        return normalised


class Own(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the base class's name
        """Normalise and activate."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(input, mean, var, self.weight, self.bias, eps=self.eps).relu()


class Swish(nn.Module):
    """An activation of its own, known by its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate."""
        return x * x.sigmoid()


def found(model: nn.Module, example: Any, code: str) -> list[Finding]:
    """Return the findings of a rule, after checking that a run and a symbolic trace agree on them where both work."""
    seen = hits(audit(model, example, select=[code]), code)
    without = audit(model, select=[code])
    if not without.skipped:
        assert hits(without, code) == seen
    return seen


IMAGE = torch.randn(4, 3, 10, 10)
ROWS = torch.randn(4, 6)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make this process a group of one, without a port."""
    path: Path = tmp_path_factory.mktemp("group") / "store"
    store = distributed.FileStore(str(path), 1)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, nn.DataParallel])
def test_bn010_plain_batchnorm_under_data_parallelism(wrapper: Any, build: Build) -> None:
    """The wrapper is named with its plain layers; synchronised ones, and the model out of it, are clean."""
    model, example = build()
    wrapped = wrapper(model)
    (finding,) = hits(audit(wrapped, example), "BN010")
    assert (finding.module, finding.severity) == ("", "warning")
    assert f"{wrapper.__name__} holds {len(norm_names(model))} plain BatchNorm layers" in finding.message
    assert f"module.{norm_names(model)[0]}" in finding.message
    assert "BN010" not in codes(audit(model, example))
    synchronise: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    assert "BN010" not in codes(audit(synchronise(wrapped), example))


@pytest.mark.usefixtures("group")
def test_bn010_a_part_of_a_model_may_be_wrapped() -> None:
    """The wrapper is named where it is; layers outside of it do not count."""
    model, _ = convolutional()
    model.register_module("1", DistributedDataParallel(model.get_submodule("1")))
    (finding,) = hits(audit(model), "BN010")
    assert finding.module == "1"
    assert "1 plain BatchNorm layers (1.module)" in finding.message


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("build", [convolutional, residual])
def test_bn010_fully_sharded_models(build: Build) -> None:
    """Each process has a part of the batch there too; the outermost wrapper is named, and the model is not run."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - needs the group
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model, example = build()
    mesh = init_device_mesh("cpu", (1,))
    for part in (next(model.children()), model):
        fully_shard(part, mesh=mesh)
    norms(model)[0].running_var.fill_(-1)  # type: ignore[union-attr]
    with torch.no_grad():
        norms(model)[0].weight[1] = float("inf")
    report = audit(model, example)
    (finding,) = hits(report, "BN010")
    assert (finding.module, "holds 2 plain BatchNorm layers" in finding.message) == ("", True)
    assert {"BN005", "BN006"} <= codes(report)
    assert "is sharded over processes" in reasons(report, "BN105")[0]


@pytest.mark.usefixtures("group")
def test_names_inside_a_wrapper_are_those_of_the_wrapped_model() -> None:
    """What is found by running the model is named as the wrapper names it, too."""
    model, example = convolutional()
    model.register_module("1", nn.BatchNorm2d(8, track_running_stats=False).eval())
    report = audit(DistributedDataParallel(model), example)
    assert [finding.module for finding in hits(report, "BN102")] == ["module.1"]
    assert [finding.module for finding in hits(report, "BN002")] == ["module.1"]


@pytest.mark.parametrize(
    ("model", "example", "name", "what"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), IMAGE, "2", "1 (relu)"),
        (nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Dropout(), nn.BatchNorm1d(4)), ROWS, "3", "1 (gelu)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Flatten(), nn.BatchNorm1d(256)), IMAGE, "3", "1 (prelu)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), Swish(), nn.Identity(), Own(4)), IMAGE, "3", "1 (swish)"),
        (Functional(), IMAGE, "norm", "relu"),
        (Untraceable(), IMAGE, "norm", "tanh"),
    ],
    ids=["stack", "dropout between", "flatten between", "own classes", "functional", "untraceable"],
)
def test_bn011_an_activation_straight_before_batchnorm(model: nn.Module, example: Any, name: str, what: str) -> None:
    """Modules and functions alike are recognised, through what hands values on as they are."""
    (finding,) = found(model.eval(), example, "BN011")
    assert (finding.module, finding.severity) == (name, "info")
    assert what in finding.message


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)), IMAGE),
        (nn.Sequential(Own(3), nn.Conv2d(3, 4, 3), Own(4)), IMAGE),
        (nn.BatchNorm2d(3), IMAGE),
    ],
    ids=["usual order", "pooling between", "own classes", "alone"],
)
def test_bn011_other_orders_are_clean(model: nn.Module, example: Any) -> None:
    """Only an activation right before counts."""
    assert not found(model.eval(), example, "BN011")


@pytest.mark.parametrize(
    ("model", "example", "name", "p"),
    [
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4)), ROWS, "2", "p=0.5"),
        (nn.Sequential(nn.Dropout2d(0.1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE, "3", "p=0.1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.25), nn.BatchNorm2d(4)), IMAGE, "2", "p=0.25"),
        (Functional(), IMAGE, "norm", "p=0.3"),
        (Untraceable(), IMAGE, "norm", "p=0.3"),
    ],
    ids=["linear", "convolution", "straight", "functional", "untraceable"],
)
def test_bn012_dropout_before_batchnorm(model: nn.Module, example: Any, name: str, p: str) -> None:
    """Dropout is recognised through the layers that pass its variance on, with its probability."""
    (finding,) = found(model.eval(), example, "BN012")
    assert (finding.module, finding.severity) == (name, "info")
    assert p in finding.message


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)), ROWS),
        (nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 4), nn.BatchNorm1d(4)), ROWS),
        (nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4)), ROWS),
        (nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(6), nn.Linear(6, 4), nn.BatchNorm1d(4)), ROWS),
        (Functional(p=0.0), IMAGE),
    ],
    ids=["behind", "probability zero", "alpha", "normalised between", "functional of zero"],
)
def test_bn012_dropout_that_shifts_nothing_is_clean(model: nn.Module, example: Any) -> None:
    """Behind the last BatchNorm, without effect, or followed by a normalisation that has no memory."""
    assert not found(model.eval(), example, "BN012")


@pytest.mark.parametrize(
    ("model", "example", "name", "what"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE, "1", "0 (conv2d)"),
        (nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.BatchNorm1d(4)), ROWS, "2", "0 (linear)"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), Own(4)), IMAGE, "1", "0 (convtranspose2d)"),
        (
            nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
            IMAGE,
            "1",
            "0 (conv2d)",
        ),
    ],
    ids=["convolution", "linear", "transposed", "parametrised"],
)
def test_bn013_a_bias_right_before_batchnorm(model: nn.Module, example: Any, name: str, what: str) -> None:
    """The layer with the bias and the BatchNorm layer are named."""
    (finding,) = found(model.eval(), example, "BN013")
    assert (finding.module, finding.severity) == (name, "info")
    assert what in finding.message


class Twice(nn.Module):
    """The output of a layer goes into BatchNorm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return both."""
        y = self.linear(x)
        if y.shape[-1] != 6:
            raise ValueError("a look at the shape is no second use")
        z: torch.Tensor = self.norm(y) + y
        return z


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGE),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), IMAGE),
        (Twice(), ROWS),
    ],
    ids=["none", "activation between", "used elsewhere too"],
)
def test_bn013_a_bias_that_matters_is_clean(model: nn.Module, example: Any) -> None:
    """No bias, one that decides what an activation cuts, or one that something else sees."""
    assert not found(model.eval(), example, "BN013")


def test_the_structure_of_programs_is_read_from_their_graphs() -> None:
    """Without an example, TorchScript and exports show the same as the model."""
    body = nn.Sequential(
        nn.Dropout(0.5), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)
    )
    model, example = settled(body, IMAGE)
    want = [(code, module) for code, module in (("BN011", "5"), ("BN012", "2"), ("BN013", "2"))]
    programs: dict[str, Any] = {
        "eager": model,
        "traced": traced(model, example),
        "scripted": scripted(model),
        "exported": exported(model, example),
        "module": exported(model, example).module(),
        "symbolic": torch.fx.symbolic_trace(model),
    }
    for kind, program in programs.items():
        report = audit(program, select=STRUCTURE)
        assert [(finding.code, finding.module) for finding in report.findings] == want, kind
        assert set(report.ran) == set(STRUCTURE), kind


@pytest.mark.parametrize("build", BUILDS)
def test_sound_models_have_a_sound_structure(build: Build) -> None:
    """The usual order, shortcuts, several inputs and recurrent layers give no finding, run or traced."""
    model, example = build()
    for code in STRUCTURE:
        assert not found(model, example, code)


def test_what_can_be_neither_run_nor_traced_is_said_to_be_unchecked() -> None:
    """Without an example the order of an untraceable model is not guessed at."""
    report = audit(Untraceable().eval())
    assert not set(STRUCTURE) & set(report.ran)
    assert "cannot be traced" in reasons(report, "BN011")[0]


class Auxiliary(nn.Module):
    """Has a second classifier that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))
        self.aux = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the main outputs."""
        y: torch.Tensor = self.main(x)
        return y + self.aux(x) if self.training else y


def test_layers_that_the_forward_does_not_reach_are_said_to_be_unchecked() -> None:
    """The rules were checked elsewhere, and say where not."""
    report = audit(Auxiliary().eval(), ROWS, select=STRUCTURE)
    assert set(report.ran) == set(STRUCTURE)
    assert reasons(report, "BN013") == ["the forward does not come to aux.1"]
    hidden = audit(nn.Sequential(scripted(Auxiliary().eval())), ROWS, select=STRUCTURE)
    assert reasons(hidden, "BN013") == ["0.main.1 and 0.aux.1 are hidden inside TorchScript"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True)),
        frozen(convolutional()[0]),
        {"weight": torch.ones(2)},
    ],
    ids=["LayerNorm", "GroupNorm and InstanceNorm", "frozen", "state_dict"],
)
def test_bn015_no_batchnorm_left_to_watch(model: Any) -> None:
    """Models without, models whose layers were folded away, and other state."""
    (finding,) = hits(audit(model.eval() if isinstance(model, nn.Module) else model), "BN015")
    assert (finding.module, finding.severity) == ("", "info")


def test_bn015_tells_what_else_normalises() -> None:
    """Other normalisations are counted by class."""
    (finding,) = hits(audit(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.RMSNorm(4)).eval()), "BN015")
    assert "has 2 LayerNorm and 1 RMSNorm" in finding.message


@pytest.mark.parametrize("build", [convolutional, residual])
def test_a_fused_model_is_clean(build: Build) -> None:
    """What fusion leaves of a layer normalises nothing: the bias before it is needed, and it can still be watched."""
    model, example = build()
    fused = fuse(model, example)
    assert sum(module.bias is not None for module in fused.modules() if isinstance(module, nn.Conv2d)) >= 2
    report = audit(fused, example)
    assert not report.findings
    assert set(STRUCTURE) <= set(report.ran)
    assert not any(reasons(report, code) for code in STRUCTURE)


class Hooked(nn.Module):
    """Has hooks that replace what its layers take, and a layer that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = nn.Linear(99, 1)
        self.linear = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.linear.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        self.norm.register_forward_hook(lambda *inputs: inputs[2] * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        with suppress(RuntimeError):
            self.broken(x)
        y: torch.Tensor = self.norm(self.linear(x))
        return y


def test_hooks_and_caught_exceptions_do_not_hide_the_order() -> None:
    """The flow goes through both."""
    report = audit(Hooked().eval(), ROWS, select=STRUCTURE)
    assert [(finding.code, finding.module) for finding in report.findings] == [("BN013", "norm")]
    assert not report.skipped


def test_bn015_any_batchnorm_is_enough() -> None:
    """In layers, in a graph, in home-made ones or in a state_dict."""
    model, example = residual()
    for subject in (model, traced(model, example), exported(model, example), model.state_dict(), tabular()[0]):
        assert "BN015" not in codes(audit(subject))
