"""The arithmetic of fused layers, for every kind of layer, and what keeps a layer from being fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fusible import answer, error, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from guardserve.batchnorm import FusedBatchNorm
from guardserve.fusion import fuse, fusion_report

CONVOLUTIONS: dict[int, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Sequential, torch.Tensor]:
    """Draw a convolution with its BatchNorm layer, in float64, and an input."""
    rank = draw(st.integers(1, 3))
    conv, transposed, norm = CONVOLUTIONS[rank]
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    options: dict[str, Any] = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "dilation": draw(st.integers(1, 2)),
    }
    if draw(st.booleans()):
        layer = transposed(inputs, outputs, **options, padding=draw(st.integers(0, 1)))
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = conv(inputs, outputs, **options, padding=draw(st.integers(0, 2)), padding_mode=mode)
    follower = norm(outputs, eps=draw(st.sampled_from([1e-5, 1e-3])), affine=draw(st.booleans()))
    model = trained(nn.Sequential(layer, follower).double(), seed=draw(st.integers(0, 99)))
    x = torch.randn(2, inputs, *[6] * rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, x


@given(convolutions())
def test_a_fused_convolution_of_any_shape_gives_what_the_two_gave(drawn: tuple[nn.Sequential, torch.Tensor]) -> None:
    """Rank, groups, transposition, stride, dilation, padding, bias and affinity: the answer is the same."""
    model, x = drawn
    fused = fuse(model, x)
    assert fusion_report(fused).fused == ("1",)
    assert type(fused[1]) is FusedBatchNorm
    torch.testing.assert_close(answer(fused, x), answer(model, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_linear_layer_gives_what_the_two_gave(norm: type[nn.Module], bias: bool) -> None:
    """Features are on BatchNorm's axis in a batch of vectors, which is what a perceptron has."""
    model = trained(nn.Sequential(nn.Linear(5, 7, bias=bias), norm(7), nn.ReLU(), nn.Linear(7, 3), norm(3)).double())
    x = torch.randn(4, 5, dtype=torch.float64)
    for fused in (fuse(model), fuse(model, x)):
        assert fusion_report(fused).fused == ("1", "4")
        torch.testing.assert_close(answer(fused, x), answer(model, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
def test_every_floating_type_is_folded_in_float64_and_cast_back(dtype: torch.dtype, tolerance: float) -> None:
    """The folded weights are those of float64, rounded once."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    fused = fuse(model, x)
    exact = fuse(copy.deepcopy(model).double())
    assert {tensor.dtype for tensor in fused.parameters()} == {dtype}
    torch.testing.assert_close(fused[0].weight, exact[0].weight.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(fused[0].bias, exact[0].bias.to(dtype), rtol=0, atol=0)
    assert error(model, fused, x) < tolerance


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=2)])
def test_the_memory_format_and_the_gradient_flag_stay(layer: Any) -> None:
    """A channels_last model stays so, and frozen weights stay frozen."""
    model = nn.Sequential(layer, nn.BatchNorm2d(4))
    layer.weight = nn.Parameter(layer.weight.to(memory_format=torch.channels_last))
    layer.requires_grad_(requires_grad=False)
    fused = fuse(model)
    assert fusion_report(fused).fused == ("1",)
    weight = fused[0].get_parameter("weight")
    assert weight.stride() == layer.weight.stride()
    assert not weight.requires_grad
    assert fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))[0].get_parameter("weight").requires_grad


def test_a_norm_with_a_weight_and_no_bias_is_fused() -> None:
    """Newer releases of torch build such layers; elsewhere somebody has taken the bias away."""
    model = trained(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)))
    model[1].register_parameter("bias", None)
    x = torch.randn(2, 2, 5)
    fused = fuse(model, x)
    assert fusion_report(fused).fused == ("1",)
    assert error(model, fused, x) < 1e-6


def test_channels_whose_weight_is_zero_are_counted_as_unobservable_and_still_right() -> None:
    """A zero or tiny weight hides what entered; a negative one does not."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))
    model[1].weight.data = torch.tensor([0.0, -1.0, 1e-7, 2.0])
    x = torch.randn(2, 3, 8, 8)
    fused = fuse(model, x)
    assert fusion_report(fused).unobservable_channels == {"1": 2}
    assert error(model, fused, x) < 1e-6


def test_layers_with_tied_weights_are_fused_each_for_itself() -> None:
    """Two convolutions that share a parameter get one each, and the original goes on sharing."""
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
    )
    model[2].weight = model[4].weight = model[0].weight
    trained(model)
    x = torch.randn(2, 3, 4, 4)
    fused = fuse(model, x)
    assert fusion_report(fused).fused == ("1", "3")
    assert error(model, fused, x) < 1e-6
    assert model[2].weight is model[0].weight


class NormAct(nn.BatchNorm2d):
    """A BatchNorm layer with an activation of its own, as timm has."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and activate."""
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")  # type: ignore[no-untyped-call]
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        z: torch.Tensor = self.act(self.drop(y))
        return z


class SuperAct(NormAct):
    """The same by way of ``super()``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and activate."""
        y: torch.Tensor = self.act(self.drop(nn.BatchNorm2d.forward(self, x)))
        return y


@pytest.mark.parametrize("norm", [NormAct, SuperAct])
def test_a_norm_that_goes_on_to_its_children_is_fused_and_keeps_them(norm: type[NormAct]) -> None:
    """The activation inside stays where it is, under its name, and what the monitor reads is what enters it."""
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 2, 1)))
    x = torch.randn(2, 3, 8, 8)
    fused = fuse(model, x)
    assert fusion_report(fused).fused == ("1",)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert error(model, fused, x) < 1e-6


class ActFirst(NormAct):
    """Activates before it normalises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate and normalise."""
        y: torch.Tensor = self.drop(super().forward(self.act(x)))
        return y


class ActTwice(NormAct):
    """Calls its activation in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and activate."""
        y: torch.Tensor = self.drop(self.act(nn.BatchNorm2d.forward(self, x)))
        return y


class Doubled(nn.BatchNorm2d):
    """Does something of its own after normalising."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and double."""
        return super().forward(x) * 2


class OtherWeight(nn.BatchNorm2d):
    """Uses other numbers than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise without the weight."""
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, None, self.bias, eps=self.eps)


class Branching(nn.BatchNorm2d):
    """Looks at its input before it normalises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise what is not empty."""
        return super().forward(x) if x.sum() > 0 else x


class Batchwise(nn.BatchNorm2d):
    """Uses the statistics of its batch in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise as in training."""
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


class OtherEpsilon(nn.BatchNorm2d):
    """Adds another number to the variance than it says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise with the default."""
        eps = self.eps * 2
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=eps)


class ChangesInput(nn.BatchNorm2d):
    """Works on its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activate, and normalise."""
        x.relu_()
        return super().forward(x)


class Constant(nn.BatchNorm2d):
    """Does not look at its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("pattern", torch.ones(1, channels, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise something else."""
        del x
        return super().forward(self.get_buffer("pattern"))


class Standardised(nn.Conv2d):
    """A convolution with standardised weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve."""
        y: torch.Tensor = self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)
        return y


class WeightBuffer(nn.Conv2d):
    """A convolution whose weight is no parameter."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class OwnParameter(nn.Parameter):
    """A tensor with ways of its own, such as a distributed or a quantised one."""


def conv_bn(conv: nn.Module | None = None, norm: nn.Module | None = None) -> nn.Sequential:
    """Build a pair of which one may be given."""
    return trained(nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)))


def changed(change: Callable[[Any, Any], object]) -> nn.Sequential:
    """Build a pair and change its convolution or its norm."""
    model = conv_bn()
    change(*model)
    return model


def without_variance(_: object, norm: nn.BatchNorm2d) -> None:
    """Make a norm divide by zero."""
    norm.get_buffer("running_var").zero_()
    norm.eps = 0.0


def set_statistic(name: str, value: float) -> nn.Sequential:
    """Build a pair of which one statistic or parameter of the norm has a bad value."""
    return changed(lambda _, norm: getattr(norm, name).data.index_fill_(0, torch.tensor([2]), value))


BEFORE = "0, which it follows, "
OWN_NORMS: tuple[type[nn.BatchNorm2d], ...] = (
    *(ActFirst, ActTwice, Doubled, OtherWeight, Branching),
    *(Batchwise, OtherEpsilon, ChangesInput, Constant),
)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no statistics": (
        lambda: conv_bn(norm=nn.BatchNorm2d(4, track_running_stats=False)),
        "it has no running statistics, and uses those of each batch",
    ),
    "nan mean": (lambda: set_statistic("running_mean", float("nan")), "its running_mean is not finite"),
    "inf variance": (lambda: set_statistic("running_var", float("inf")), "its running_var is not finite"),
    "nan weight": (lambda: set_statistic("weight", float("nan")), "its weight is not finite"),
    "negative variance": (lambda: set_statistic("running_var", -1.0), "its running_var is negative"),
    "no variance": (
        lambda: changed(without_variance),
        f"{BEFORE}would have non-finite parameters",
    ),
    "own convolution": (
        lambda: conv_bn(Standardised(3, 4, 3)),
        f"{BEFORE}is a Standardised, whose forward is not known to be the usual one",
    ),
    "own forward": (
        lambda: changed(lambda conv, _: setattr(conv, "forward", conv.forward)),
        f"{BEFORE}is a Conv2d, whose forward is not known to be the usual one",
    ),
    **{
        kind.__name__: (
            partial(lambda kind: conv_bn(norm=kind(4)), kind),
            f"it is a {kind.__name__}, whose forward is not known to be the usual one",
        )
        for kind in OWN_NORMS
    },
    "hooked convolution": (
        lambda: changed(lambda conv, _: conv.register_forward_hook(print)),
        f"{BEFORE}has hooks: fuse the model before it gets hooks or monitors",
    ),
    "hooked norm": (
        lambda: changed(lambda _, norm: norm.register_forward_pre_hook(print)),
        "it has hooks: fuse the model before it gets hooks or monitors",
    ),
    "pruned": (
        lambda: changed(lambda conv, _: prune.l1_unstructured(conv, "weight", 0.5)),  # type: ignore[no-untyped-call]
        f"{BEFORE}has hooks: fuse the model before it gets hooks or monitors",
    ),
    "parametrized": (
        lambda: conv_bn(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
        f"{BEFORE}is parametrized: remove the parametrizations first",
    ),
    "weight buffer": (
        lambda: conv_bn(WeightBuffer(3, 4, 3)),
        f"{BEFORE}keeps its weight or bias elsewhere than in its parameters",
    ),
    "tensor subclass": (
        lambda: changed(lambda conv, _: setattr(conv, "weight", OwnParameter(conv.weight.detach()))),
        f"{BEFORE}holds a OwnParameter on cpu as weight",
    ),
    "no data": (lambda: conv_bn().to("meta"), "it holds a Parameter on meta as weight"),
    "two types": (
        lambda: conv_bn(nn.Conv2d(3, 4, 3).bfloat16()),
        "it and the layer that it follows are of bfloat16 and float32",
    ),
    "complex": (
        lambda: conv_bn(nn.Conv2d(3, 4, 3, dtype=torch.complex64)),
        "it and the layer that it follows are of complex64 and float32",
    ),
    "another axis": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(4)),
        f"{BEFORE}has its channels on another axis",
    ),
    "another rank": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm3d(4)),
        f"{BEFORE}has its channels on another axis",
    ),
    "compiled": (
        lambda: torch.compile(conv_bn(), backend="eager"),  # type: ignore[dict-item, return-value]
        "it is in a compiled module: fuse the model, and compile the fused copy",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fused_stays_as_it_is_with_the_reason(build: Callable[[], nn.Module], reason: str) -> None:
    """The report names the layer and why, and the copy holds the very same numbers."""
    model = build()
    fused = fuse(model)
    report = fusion_report(fused)
    assert report.fused == ()
    assert list(report.skipped.values()) == [reason]
    assert not any(isinstance(module, FusedBatchNorm) for module in fused.modules())
    ours, theirs = fused.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].is_meta or ours[key].equal(theirs[key]) or ours[key].isnan().any() for key in ours)


def test_the_axis_of_a_linear_layer_is_seen_in_the_example() -> None:
    """With as many positions as features only an input tells which axis is normalised."""
    model = trained(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    sequences, vectors = torch.randn(2, 3, 3), torch.randn(2, 3)
    assert fusion_report(fuse(model, sequences)).skipped == {
        "1": "0, which it follows, has its channels on another axis"
    }
    assert fusion_report(fuse(model, vectors)).fused == ("1",)
    with pytest.raises(ValueError, match=r"fused for inputs of 2 dimensions and got \(2, 3, 3\): fuse the model with"):
        fuse(model)(sequences)
    assert error(model, fuse(model), vectors) < 1e-6


def test_a_convolution_of_an_unbatched_input_is_not_mistaken_for_a_batch() -> None:
    """Conv1d takes (C, L) too, which BatchNorm1d then reads as (N, C)."""
    model = trained(nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)))
    assert fusion_report(fuse(model, torch.randn(2, 4))).fused == ()
    assert fusion_report(fuse(model, torch.randn(1, 2, 4))).fused == ("1",)
