"""Rules on modes: BN001, BN002, BN003 and BN014."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from audit.models import BUILDS, Build, codes, convolutional, hits, norm_names, norms, reasons, residual, tabular
from audit.programs import every_kind, exported, frozen, scripted, silence, traced
from torch import nn

from guardserve.audit import Report, audit

IMAGES: tuple[Build, ...] = (convolutional, residual)


class ReadsFlag(nn.Module):
    """Normalises in its own code, by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(5))
        self.register_buffer("running_var", torch.ones(5) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return F.batch_norm(x, self.get_buffer("running_mean"), self.get_buffer("running_var"), training=self.training)


class ReadsNothing(nn.Module):
    """Behaves alike in both modes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double."""
        return 2 * x


class Stubborn(nn.Sequential):
    """Stays in training mode whatever it is told."""

    def train(self, mode: bool = True) -> Stubborn:
        """Train."""
        del mode
        return super().train()


def static(model: Any) -> Report:
    """Audit without an example."""
    return audit(model, ignore=["BN1"])


@pytest.mark.parametrize("build", BUILDS)
def test_bn001_a_model_all_in_training_mode_is_one_finding(build: Build) -> None:
    """It names the model itself, counts its BatchNorm layers and names the first of them."""
    model, _ = build()
    assert "BN001" not in codes(static(model))
    (finding,) = hits(static(model.train()), "BN001")
    assert (finding.module, finding.severity) == ("", "error")
    assert f"training is True in {len(list(model.modules()))} modules" in finding.message
    assert norm_names(model)[0] in finding.message


@pytest.mark.parametrize("build", BUILDS)
def test_bn001_a_single_layer_is_named(build: Build) -> None:
    """A layer that somebody put back is found in a model that else is in eval mode."""
    model, _ = build()
    norms(model)[-1].train()
    (finding,) = hits(static(model), "BN001")
    assert (finding.module, finding.severity) == (norm_names(model)[-1], "error")


def test_bn001_the_outermost_module_that_trains_stands_for_what_is_inside() -> None:
    """Two subtrees are two findings; a layer that a fine-tuner froze inside of one is not counted in it."""
    model, _ = residual()
    model.get_submodule("norms").train()
    model.get_submodule("head").train()
    model.get_submodule("norms.second").eval()
    findings = hits(static(model), "BN001")
    assert [(finding.module, finding.severity) for finding in findings] == [("norms", "error"), ("head", "warning")]
    assert "training is True in 2 modules: 1 BatchNorm2d (norms.first)" in findings[0].message


def test_bn001_dropout_recurrent_dropout_and_code_that_reads_the_flag_are_errors() -> None:
    """What behaves differently in training mode is an error; what does not is a warning."""
    sensitive = (nn.Dropout(), nn.GRU(2, 2, num_layers=2, dropout=0.1), ReadsFlag(), nn.MultiheadAttention(2, 1, 0.1))
    alike = (nn.ReLU(), nn.GRU(2, 2), ReadsNothing(), nn.MultiheadAttention(2, 1))
    for modules, severity in ((sensitive, "error"), (alike, "warning")):
        for module in modules:
            assert [f.severity for f in hits(static(nn.Sequential(module).train()), "BN001")] == [severity], module


def test_bn001_a_train_that_always_trains_is_seen_through() -> None:
    """eval() was called, and did not help."""
    model = Stubborn(nn.BatchNorm1d(3)).eval()
    (finding,) = hits(static(nn.Sequential(nn.Linear(3, 3), model).train(False)), "BN001")
    assert finding.module == "1"


@pytest.mark.parametrize("build", IMAGES)
def test_bn001_leaves_flags_alone_that_nothing_reads(build: Build) -> None:
    """What torch.export returns, and wrappers of a model in eval mode, say training and mean nothing by it."""
    model, example = build()
    made = every_kind(model, example)
    assert made["module"].training
    assert made["unflattened"].training
    with silence():
        compiled = torch.compile(model)
    for harmless in (*made.values(), nn.DataParallel(model), compiled):
        assert "BN001" not in codes(static(harmless))


def test_bn001_looks_into_wrappers_of_a_model_that_trains() -> None:
    """The model inside is named as the wrapper names it."""
    model, _ = convolutional()
    with silence():
        compiled = torch.compile(model.train())
    for wrapped, name in ((nn.DataParallel(model), "module"), (compiled, "_orig_mod")):
        assert [finding.module for finding in hits(static(wrapped), "BN001")] == [name]


def test_bn001_counts_the_flags_that_a_scripted_program_reads() -> None:
    """A script reads its flags; a trace and a frozen script do not, whatever they say."""
    model, example = convolutional()
    script = scripted(model)
    assert "BN001" not in codes(static(script))
    assert "BN001" not in codes(static(traced(model, example).train()))
    assert "BN001" not in codes(static(frozen(model)))
    (finding,) = hits(static(script.train()), "BN001")
    assert (finding.module, finding.severity) == ("", "error")
    assert "2 BatchNorm2d (1 and 4) and 1 Dropout (8)" in finding.message
    (finding,) = hits(static(nn.ModuleList([nn.ReLU().eval(), script]).train(False).append(script.train())), "BN001")
    assert finding.module == "1"


@pytest.mark.parametrize("build", BUILDS)
def test_bn002_layers_without_statistics(build: Build) -> None:
    """Statistics that were set to None, and layers built without, are found by name."""
    model, _ = build()
    layer = norms(model)[-1]
    layer.running_mean = layer.running_var = None
    (finding,) = hits(static(model), "BN002")
    assert (finding.module, finding.severity) == (norm_names(model)[-1], "error")
    assert "running_mean and running_var are None" in finding.message


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.SyncBatchNorm(4, track_running_stats=False),
        nn.LazyBatchNorm2d(track_running_stats=False),
        type("Own", (nn.BatchNorm2d,), {})(4, track_running_stats=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_bn002_every_kind_of_batchnorm(layer: nn.Module) -> None:
    """All ranks, the synchronised and the lazy ones, and subclasses."""
    assert [finding.module for finding in hits(static(nn.Sequential(nn.Identity(), layer).eval()), "BN002")] == ["1"]


def test_bn002_layers_that_need_no_statistics_are_clean() -> None:
    """InstanceNorm, GroupNorm and LayerNorm normalise within a sample."""
    model = nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)).eval()
    assert "BN002" not in codes(static(model))


def test_bn002_the_attribute_alone_does_not_make_eval_use_the_batch() -> None:
    """Set after the layer was built it only stops the updates: an info, and the outputs prove it harmless."""
    model, example = convolutional()
    before = model(example)
    norms(model)[0].track_running_stats = False
    assert torch.equal(model(example), before)
    (finding,) = hits(audit(model, example), "BN002")
    assert (finding.module, finding.severity) == ("1", "info")


@pytest.mark.parametrize("build", [convolutional, residual, tabular])
def test_bn003_training_mode_in_every_kind_of_graph(build: Build) -> None:
    """The layers are named in each program made in training mode; those made in eval mode are clean."""
    model, example = build()
    for kind, program in every_kind(model, example).items():
        assert not hits(static(program), "BN003"), kind
    for kind, program in every_kind(model.train(), example).items():
        findings = hits(static(program), "BN003")
        prefix = "program." if kind == "inside" else ""
        assert sorted(f.module for f in findings) == sorted(prefix + name for name in norm_names(model)), kind
        assert all(finding.severity == "error" for finding in findings)


def test_bn003_is_found_in_a_program_that_was_saved() -> None:
    """Saved in training mode and loaded again, it says eval and is not."""
    model, example = convolutional()
    buffer = io.BytesIO()
    with silence():
        torch.jit.save(traced(model.train(), example), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer).eval()  # type: ignore[no-untyped-call]
    assert not loaded.training
    assert len(hits(static(loaded), "BN003")) == 2


def test_bn003_a_functional_normalisation_in_a_symbolic_trace() -> None:
    """torch.fx bakes the mode of F.batch_norm, and of nothing else."""
    trained = torch.fx.symbolic_trace(ReadsFlag().train())
    assert len(hits(static(trained), "BN003")) == 1
    assert not hits(static(torch.fx.symbolic_trace(ReadsFlag().eval())), "BN003")


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is normalised by batch_norm, as weight standardisation does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the base class's name
        """Convolve."""
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(input, weight.view_as(self.weight), self.bias)


def test_bn003_weight_standardisation_is_legitimate() -> None:
    """A weight that is normalised by its own statistics depends on no request."""
    model = nn.Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4)).eval()
    example = torch.randn(4, 3, 8, 8)
    for program in every_kind(model, example).values():
        assert not codes(audit(program, example)) & {"BN003", "BN102", "BN103"}


@pytest.mark.parametrize("build", BUILDS)
def test_bn014_frozen_parameters_under_moving_statistics(build: Build) -> None:
    """Freezing all parameters and leaving the model in training mode is found in every layer."""
    model, _ = build()
    model.train().requires_grad_(requires_grad=False)
    findings = hits(static(model), "BN014")
    assert [finding.module for finding in findings] == norm_names(model)
    assert "updates its statistics" in findings[0].message
    assert "BN014" not in codes(static(model.eval())), "frozen and in eval mode is how it should be"


@pytest.mark.parametrize("build", BUILDS)
def test_bn014_statistics_that_stand_still_under_trained_parameters(build: Build) -> None:
    """A layer in eval mode in a model that trains, its scale still trained, is found."""
    model, _ = build()
    model.train()
    norms(model)[0].eval()
    (finding,) = hits(static(model), "BN014")
    assert (finding.module, finding.severity) == (norm_names(model)[0], "warning")
    norms(model)[0].requires_grad_(requires_grad=False)
    assert "BN014" not in codes(static(model))


def test_bn014_a_served_model_in_a_fresh_container_is_not_being_trained() -> None:
    """A container and a softmax in training mode train nothing."""
    model, _ = convolutional()
    report = static(nn.Sequential(model, nn.Softmax(1)))
    assert codes(report) == {"BN001"}
    assert not report.reaches("error")


def test_rules_on_layers_say_where_there_are_none_to_look_at() -> None:
    """In a graph or in home-made layers BN002 and BN014 cannot be checked, and are not claimed to be."""
    model, example = convolutional()
    for other in (exported(model, example), nn.Sequential(ReadsFlag()).eval()):
        report = static(other)
        assert not {"BN002", "BN014"} & set(report.ran)
        assert "torch.nn are needed" in reasons(report, "BN002")[0]
