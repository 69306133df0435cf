"""Rules on the numbers that layers keep: BN004 to BN009."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from audit.models import BUILDS, Build, codes, convolutional, hits, norm_names, norms, reasons
from audit.programs import frozen, silence, traced
from torch import nn

from guardserve.audit import audit

STATISTICS = {f"BN00{number}" for number in range(4, 10)}


def spoil(build: Build, attribute: str, value: float, channel: int = 1) -> tuple[nn.Module, str]:
    """Write a value into one channel of the last BatchNorm layer; return the model and the layer's name."""
    model, _ = build()
    layer = norms(model)[-1]
    with torch.no_grad():
        getattr(layer, attribute)[channel] = value
    return model, norm_names(model)[-1]


class Normalised(nn.Module):
    """A layer of its own, which keeps its statistics under other names and outside the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.moving_mean = torch.full((3,), 0.5)
        self.moving_var = torch.full((3,), 2.0)
        self.gamma = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return self.gamma * (x - self.moving_mean) / self.moving_var.sqrt()


@pytest.mark.parametrize("build", BUILDS)
def test_sound_statistics_give_no_finding_in_module_or_state_dict(build: Build) -> None:
    """A model with the statistics of its data is clean, and so is its state_dict."""
    model, _ = build()
    assert not codes(audit(model)) & STATISTICS
    report = audit(model.state_dict())
    assert not report.findings
    assert set(report.ran) >= STATISTICS
    assert "state_dict" in report.subject


@pytest.mark.parametrize("build", BUILDS)
def test_bn004_statistics_that_were_never_updated(build: Build) -> None:
    """Layers as they are made are found, in a model and in its state_dict."""
    model, _ = build()
    for layer in norms(model):
        layer.reset_running_stats()
    for report in (audit(model, select=["BN004"]), audit(model.state_dict(), select=["BN004"])):
        assert [finding.module for finding in report.findings] == norm_names(model)
        assert all(finding.severity == "warning" for finding in report.findings)
        assert "num_batches_tracked is 0" in report.findings[0].message


def test_bn004_goes_by_the_values_and_not_by_the_count() -> None:
    """A trained layer whose count was lost is clean; a fresh one with a count is not."""
    model, _ = convolutional()
    for layer in norms(model):
        layer.num_batches_tracked.zero_()  # type: ignore[union-attr]
    assert "BN004" not in codes(audit(model))
    norms(model)[0].reset_running_stats()
    norms(model)[0].num_batches_tracked.fill_(100)  # type: ignore[union-attr]
    (finding,) = hits(audit(model), "BN004")
    assert (finding.module, "is 100" in finding.message) == ("1", True)
    model.get_buffer("1.running_var")[0] = 1.5
    assert "BN004" not in codes(audit(model)), "one channel that moved is enough"


@pytest.mark.parametrize("attribute", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("build", BUILDS)
def test_bn005_non_finite_statistics_and_parameters(build: Build, value: float, attribute: str) -> None:
    """The layer, the tensor, the number of values and the channel are named, in a model and a state_dict."""
    model, name = spoil(build, attribute, value)
    for report in (audit(model), audit(model.state_dict())):
        (finding,) = hits(report, "BN005")
        assert (finding.module, finding.severity) == (name, "error")
        assert f"{attribute} holds 1 non-finite value of {norms(model)[-1].num_features} (channel 1)" in finding.message


def test_bn005_damage_that_was_fused_or_frozen_into_other_layers() -> None:
    """The NaN of a running mean goes into a bias: in torch's own fusion, in a frozen trace or script, inside others."""
    model, example = convolutional()
    sound: list[nn.Module] = [frozen(model), frozen_trace(model, example), fused(model)]
    norms(model)[0].get_buffer("running_mean")[1] = torch.nan
    spoilt: list[nn.Module] = [frozen(model), frozen_trace(model, example), fused(model)]
    for program in [*sound, nn.Sequential(sound[0]).eval()]:
        assert "BN005" not in codes(audit(program))
    reports = [audit(program) for program in (*spoilt, nn.Sequential(spoilt[0]).eval())]
    for report in [*reports, audit(fused(model).state_dict())]:
        (finding,) = hits(report, "BN005")
        assert (finding.severity, "bias" in finding.module + finding.message) == ("error", True)
    first = frozen(nn.Sequential(copy.deepcopy(norms(model)[0]), nn.Conv2d(8, 2, 1)).eval())
    assert [finding.module for finding in hits(audit(nn.Sequential(first).eval()), "BN005")] == ["0.0"]


def frozen_trace(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Trace and freeze."""
    with silence():
        program: nn.Module = torch.jit.freeze(traced(model, example))
    return program


def fused(model: Any) -> nn.Module:
    """Fuse the first BatchNorm layer of the plain stack into the convolution before it, as torch does."""
    merged = copy.deepcopy(model)
    merged[0] = torch.nn.utils.fuse_conv_bn_eval(merged[0], merged[1])
    merged[1] = nn.Identity()
    return merged  # type: ignore[no-any-return]


def test_bn005_a_mask_of_minus_infinity_is_no_damage() -> None:
    """Kept as a parameter, as some models do; a NaN or plus infinity is."""
    model, _ = convolutional()
    mask = nn.Parameter(torch.tensor([0.0, -torch.inf]))
    model.register_parameter("mask", mask)
    assert "BN005" not in codes(audit(model))
    for value in (torch.nan, torch.inf):
        mask.data[0] = value
        (finding,) = hits(audit(model), "BN005")
        assert finding.message.startswith("mask holds 1 non-finite value of 2")


def test_bn005_many_damaged_layers_become_one_finding_that_names_what_holds_them() -> None:
    """More than three layers are told together, all of them in ``modules``."""
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.ModuleList(nn.BatchNorm1d(4) for _ in range(5))})
    for layer in norms(model):
        layer.running_mean.fill_(float("nan"))  # type: ignore[union-attr]
    (finding,) = audit(model, select=["BN005"]).findings
    assert finding.module == "body"
    assert finding.modules == tuple(f"body.{index}" for index in range(5))
    assert "5 modules, which are body.0 (running_mean holds 4 non-finite values of 4" in finding.message
    assert "and 2 more" in finding.message


@pytest.mark.parametrize("build", BUILDS)
def test_bn006_negative_variance(build: Build) -> None:
    """The least value and its channel are named, and why it gives NaN."""
    model, name = spoil(build, "running_var", -0.25)
    for report in (audit(model), audit(model.state_dict())):
        (finding,) = hits(report, "BN006")
        assert (finding.module, finding.severity) == (name, "error")
        assert "(channel 1), least -0.25" in finding.message
        assert "NaN" in finding.message


def test_bn006_a_variance_that_eps_outweighs_is_told_to_be_damage_and_not_nan() -> None:
    """The message says what is true of the value seen."""
    model, _ = spoil(convolutional, "running_var", -1e-7)
    (finding,) = hits(audit(model), "BN006")
    assert "eps=1e-05 still outweighs it" in finding.message
    assert "NaN" not in finding.message


@pytest.mark.parametrize("build", BUILDS)
def test_bn007_near_dead_channels_are_counted(build: Build) -> None:
    """Variances below eps, down to zero, are an info; eps is the layer's own."""
    model, name = spoil(build, "running_var", 0.0)
    (finding,) = hits(audit(model), "BN007")
    assert (finding.module, finding.severity) == (name, "info")
    assert f"1 of {norms(model)[-1].num_features} channels have a running variance below eps=1e-05" in finding.message
    norms(model)[-1].eps = 0.0
    assert "BN007" not in codes(audit(model))
    assert "BN007" in codes(audit(model.state_dict())), "a state_dict does not tell eps; the usual one is assumed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", BUILDS)
def test_bn008_half_precision(build: Build, dtype: torch.dtype) -> None:
    """Layers that were converted with the model are found, those kept in float32 are not."""
    model, _ = build()
    model.to(dtype)
    for report in (audit(model), audit(model.state_dict())):
        assert [finding.module for finding in hits(report, "BN008")] == norm_names(model)
        assert str(dtype).removeprefix("torch.") in hits(report, "BN008")[0].message
    for layer in norms(model):
        layer.float()
    assert "BN008" not in codes(audit(model))


def test_bn008_parameters_alone_count_too() -> None:
    """A layer of which only the scale was converted is named with it."""
    model, _ = convolutional()
    layer = norms(model)[0]
    layer.weight = nn.Parameter(layer.weight.half())
    (finding,) = hits(audit(model), "BN008")
    assert "weight is held in float16" in finding.message


@pytest.mark.parametrize(
    ("attribute", "value"), [("running_var", 1e6), ("running_mean", -7e4), ("weight", 1e5), ("bias", -66000.0)]
)
@pytest.mark.parametrize("build", BUILDS)
def test_bn009_overflow_in_half(build: Build, attribute: str, value: float) -> None:
    """What float16 cannot hold is a warning that names the tensor and its largest value."""
    model, name = spoil(build, attribute, value)
    (finding,) = hits(audit(model), "BN009")
    assert (finding.module, finding.severity) == (name, "warning")
    assert f"{attribute} reaches {abs(value):.4g}" in finding.message
    assert torch.tensor(value).half().isinf()


def test_bn009_underflow_counts_only_where_eps_does_not_outweigh_it() -> None:
    """A variance that becomes zero is a warning with a tiny eps, and an info with the usual one."""
    model, _ = spoil(convolutional, "running_var", 1e-9)
    (finding,) = hits(audit(model), "BN009")
    assert finding.severity == "info"
    assert "eps outweighs" in finding.message
    norms(model)[-1].eps = 1e-12
    (finding,) = hits(audit(model), "BN009")
    assert finding.severity == "warning"
    assert "by a factor of up to 31.6" in finding.message, "sqrt((1e-9 + 1e-12) / 1e-12)"
    norms(model)[-1].eps = 0.0
    (finding,) = hits(audit(model), "BN009")
    assert "by a factor of up to inf" in finding.message


def test_bn009_leaves_large_values_that_half_can_hold_alone() -> None:
    """The largest float16 itself is not beyond float16."""
    model, _ = spoil(convolutional, "running_var", 65504.0)
    assert "BN009" not in codes(audit(model))


def test_statistics_of_other_layers_are_judged_too() -> None:
    """InstanceNorm with statistics, a frozen BatchNorm and home-made layers keep numbers that can be damaged."""
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), Normalised(), copy.deepcopy(Normalised()))
    model.get_buffer("0.running_var").fill_(-1)
    model[1].moving_var = torch.full((3,), float("nan"))
    model[2].gamma = nn.Parameter(torch.full((3,), float("inf")))
    report = audit(model)
    assert [finding.module for finding in hits(report, "BN006")] == ["0"]
    assert [finding.module for finding in hits(report, "BN005")] == ["1", "2"]
    assert not hits(audit(nn.Sequential(Normalised())), "BN004")


def test_layers_without_values_are_said_to_be_unchecked() -> None:
    """Lazy layers and those on the meta device have none."""
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    lazy = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()).eval()
    for model, word in ((meta, "meta device"), (lazy, "lazy")):
        report = audit(model)
        assert not codes(report) & STATISTICS
        for code in STATISTICS:
            (reason,) = reasons(report, code)
            assert reason.startswith("1 was not checked")
            assert word in reason


def test_keys_of_a_state_dict_may_have_any_prefix_and_other_entries() -> None:
    """A prefix of DistributedDataParallel stays in the names; extra state and foreign tensors are passed over."""
    model, _ = convolutional()
    state = {f"module.{key}": value for key, value in model.state_dict().items()} | {"module._extra_state": 3}
    state["module.4.running_var"][0] = -1
    report = audit(state)
    assert [finding.module for finding in report.findings] == ["module.4"]


def test_an_empty_state_dict_is_said_to_hold_no_batchnorm() -> None:
    """There is nothing to judge, and nothing else is claimed."""
    report = audit({})
    assert codes(report) == {"BN015"}
    assert not {"BN001", "BN002", "BN003", "BN014", "BN101"} & set(report.ran)
