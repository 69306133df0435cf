"""Fused copies of whole models: what they answer, what the monitor and the guard make of them, and how they travel."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fusible import answer, error, trained
from mobilenet import MobileNetV2, photos, weights
from serving import loaded
from torch import nn

from guardserve import (
    EvalGuard,
    FusionError,
    Monitor,
    NonFiniteOutputError,
    TrainingModeError,
    fuse,
    fusion_report,
)
from guardserve.batchnorm import FusedBatchNorm, batchnorm_layers
from guardserve.cli import main
from guardserve.exceptions import GuardserveError
from guardserve.fusion import check_fused
from guardserve.metrics import Metrics
from guardserve.monitor import LayerShift
from guardserve.runtime import Runtime, fuse_loaded
from guardserve.signature import TensorSpec

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    """Build a small trained model of which one norm can be fused and one cannot, in training mode."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten()
    )
    return trained(model)


def resnet(name: str) -> nn.Module:
    """Build a network of the benchmarks, with BatchNorm statistics that random inputs fit."""
    spec = importlib.util.spec_from_file_location("resnet", ROOT / "benchmarks" / "resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model: nn.Module = getattr(module, name)()
    for _, norm in batchnorm_layers(model):
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def shifts(model: nn.Module, batch: torch.Tensor) -> dict[str, LayerShift]:
    """Return what a monitor says of a model's layers."""
    with Monitor(model) as monitor:
        EvalGuard(model)(batch)
        return {layer.name: layer for layer in monitor.snapshot().layers}


def assert_same_shifts(plain: dict[str, LayerShift], fused: dict[str, LayerShift]) -> None:
    """Compare the effect sizes of all layers."""
    assert plain.keys() == fused.keys()
    for name, layer in plain.items():
        for size in ("mean_shift", "log_std_ratio", "wasserstein2"):
            assert getattr(fused[name], size) == pytest.approx(getattr(layer, size), rel=1e-3), name


def test_a_pretrained_network_answers_and_is_monitored_as_before_on_photos() -> None:
    """All 52 layers of MobileNetV2 are fused; classes, logits and effect sizes on real photos agree."""
    model = MobileNetV2()
    model.load_state_dict(torch.load(weights(), weights_only=True))
    images, labels = photos()
    fused = fuse(model, images[:2])
    report = fusion_report(fused)
    assert len(report.fused) == 52
    assert not report.skipped
    assert not report.unobservable_channels
    assert error(model, fused, images) < 1e-4
    logits = EvalGuard(fused)(images)
    assert logits.argmax(1).equal(EvalGuard(model)(images).argmax(1))
    assert int((logits.argmax(1) == labels).sum()) >= 17
    for batch in (images[:8], images[8:12] * 0.3):  # as in training, and darker
        assert_same_shifts(shifts(model, batch), shifts(fused, batch))


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 20), ("resnet50", 53)])
def test_residual_networks_are_fused_wholly(name: str, layers: int) -> None:
    """Every BatchNorm of a ResNet follows its own convolution, also where branches meet."""
    model = resnet(name)
    x = torch.randn(4, 3, 64, 64) * 1.5
    fused = fuse(model, x)
    assert len(fusion_report(fused).fused) == layers
    assert error(model, fused, x) < 1e-4
    assert_same_shifts(shifts(model, x), shifts(fused, x))


def test_the_original_stays_as_it_is_flags_hooks_and_all() -> None:
    """Its modules, numbers and modes are untouched, and its copy is in eval mode."""
    model = small()
    model[3].eval()
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))
    fused = fuse(model, X)
    assert [module.training for module in model.children()] == [True, True, True, False, True, True]
    assert not any(module.training for module in fused.modules())
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert set(vars(model)) == keys
    assert type(model[1]) is nn.BatchNorm2d
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in [*model.modules(), *fused.modules()]
    )
    assert not {id(tensor) for tensor in model.parameters()} & {id(tensor) for tensor in fused.parameters()}


def test_names_and_the_module_tree_stay() -> None:
    """A fused layer is found where the norm was, and only it and its convolution have changed."""
    model = small()
    fused = fuse(model)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert type(fused[1]) is FusedBatchNorm
    assert fusion_report(fused).fused == ("1",)
    assert set(model.state_dict()) - set(fused.state_dict()) == {"1.num_batches_tracked"}


def test_a_fused_model_is_copied_pickled_saved_and_fused_again() -> None:
    """It travels as any module does, its report goes along, and there is nothing left to fuse."""
    fused = fuse(small(), X)
    expected = answer(fused, X)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(fused, X)):  # noqa: S301 - our own
        assert answer(other, X).equal(expected)
    assert fusion_report(pickle.loads(pickle.dumps(fused))) == fusion_report(fused)  # noqa: S301 - our own
    assert fusion_report(fuse(fused)).fused == ()
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other = fuse(trained(small(), seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert answer(other, X).equal(expected)


def test_a_fused_model_compiles_without_a_graph_break() -> None:
    """What is left of the norms is transparent to the compiler."""
    fused = fuse(small(), X)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), answer(fused, X))
    assert fusion_report(compiled) == fusion_report(fused)  # type: ignore[arg-type]


def test_a_guarded_model_can_be_fused_and_a_fused_one_guarded() -> None:
    """The guard's hooks do not stand in the way, stay on the original, and check the copy's outputs too."""
    model = small()
    guard = EvalGuard(model)
    fused = fuse(model, X)
    assert fusion_report(fused).fused == ("1",)
    fused.train()
    watched = EvalGuard(fused)
    torch.testing.assert_close(watched(X), guard(X), rtol=1e-5, atol=1e-5)
    assert fused.training
    with pytest.raises(NonFiniteOutputError):
        watched(X * float("inf"))
    assert watched.counts["buffers_changed"] == watched.counts["hazards"] == 0


def test_the_guard_still_sees_the_hazards_that_fusion_leaves() -> None:
    """A norm with batch statistics is not fused, and the guard refuses the copy as it refuses the model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(TrainingModeError, match="2 \\(BatchNorm2d\\) has no running statistics"):
        EvalGuard(fuse(model, X))


@pytest.mark.parametrize("kind", ["script", "export"])
def test_the_norms_of_a_graph_are_listed_and_left(kind: str) -> None:
    """TorchScript and exported programs come back as they are, with the remedy."""
    model = small().eval()
    with pytest.warns(DeprecationWarning, match="torch.jit") if kind == "script" else pytest.MonkeyPatch.context():
        graph = torch.jit.script(model) if kind == "script" else torch.export.export(model, (X,)).module()
    fused = fuse(graph, X)
    reason = "it is part of a TorchScript or exported graph: fuse the model before tracing or exporting it"
    assert fusion_report(fused).skipped == {"1": reason, "3": reason}
    torch.testing.assert_close(fused(X), answer(model, X))
    mixed = fuse(trained(nn.Sequential(graph, nn.Linear(72, 3), nn.BatchNorm1d(3))), X)
    assert fusion_report(mixed).fused == ("2",)
    assert set(fusion_report(mixed).skipped) == {"0.1", "0.3"}


class Typed(nn.Module):
    """Goes another way for tensors than for the placeholders of a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the convolution's own output, in secret."""
        y = self.conv(x)
        z: torch.Tensor = self.norm(y)
        if isinstance(x, torch.Tensor):
            z += y
        return z


class Named(Typed):
    """Names its output after the type of its norm."""

    def forward(self, x: torch.Tensor) -> Any:
        """Return a dict."""
        return {type(self.norm).__name__: self.norm(self.conv(x))}


def test_a_copy_that_answers_otherwise_is_refused() -> None:
    """What tracing cannot know shows in the answers to the example, and no such copy is returned."""
    with pytest.raises(FusionError, match=r"output of the fused copy differs from the model's by .* more than 0.00035"):
        fuse(trained(Typed()), X)
    with pytest.raises(FusionError, match="returns other tensors than the model"):
        fuse(trained(Named()), X)
    model = trained(Typed())
    with pytest.raises(FusionError, match="differs"):
        check_fused(model, fuse(model), X)
    other = small()
    check_fused(other, fuse(other), X)


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1.5e-8), (torch.float32, 3.5e-4), (torch.float16, 0.031), (torch.bfloat16, 0.088)],
)
@pytest.mark.parametrize("side", [0.5, 1.5])
def test_half_of_the_digits_must_agree(dtype: torch.dtype, allowed: float, side: float) -> None:
    """The tolerance is relative to the largest output, and that of the coarsest type."""
    model = nn.Linear(1, 2, bias=False).to(dtype)
    model.weight.data = torch.tensor([[1.0], [256.0]], dtype=dtype)
    other = copy.deepcopy(model)
    other.weight.data[0] += 256 * allowed * side
    one = torch.ones(1, 1, dtype=dtype)
    if side < 1:
        check_fused(model, other, one)
    else:
        with pytest.raises(FusionError, match="differs"):
            check_fused(model, other, one)


def test_values_that_are_not_numbers_must_be_so_in_both_and_classes_are_not_compared() -> None:
    """NaN equals NaN, infinity equals infinity, neither equals a number; an integer may flip at a tie."""

    class Answers(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = values

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + torch.tensor(self.values), (torch.tensor(self.values) > 0).long()

    nan, inf = float("nan"), float("inf")
    zero = torch.zeros(3)
    check_fused(Answers([nan, inf, 1.0]), Answers([nan, inf, 1.0]), zero)
    check_fused(Answers([0.0, 0.0, 0.0]), Answers([0.0, 0.0, 1e-6]), zero)
    check_fused(Answers([1.0, 0.0, 0.0]), Answers([1.0, 0.0, 1e-6]), zero)
    for other in ([nan, nan, 1.0], [nan, inf, 2.0], [0.0, inf, 1.0], [nan, -inf, 1.0]):
        with pytest.raises(FusionError):
            check_fused(Answers([nan, inf, 1.0]), Answers(other), zero)


class Noisy(nn.Module):
    """Adds noise, counts its calls and changes its input: none of it may show in the comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run."""
        self.calls += 1
        y: torch.Tensor = self.net(x.mul_(2) + torch.rand(()))
        return y * self.calls


def test_noise_state_and_work_in_place_do_not_disturb_the_comparison() -> None:
    """Both run from the same state with the same random numbers, on copies; the example stays as it is."""
    model, x = Noisy(), X.clone()
    state = torch.random.get_rng_state()
    fused = fuse(model, x)
    assert fusion_report(fused).fused == ("net.1",)
    assert model.calls == fused.calls == 0
    assert x.equal(X)
    assert torch.random.get_rng_state().equal(state)


def test_a_training_call_inside_the_forward_does_not_disturb_the_comparison() -> None:
    """Both are held in eval mode, as a guard would hold them."""

    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.train()
            y: torch.Tensor = self.net(x)
            return y

    assert fusion_report(fuse(Trains(), X)).fused == ("net.1",)


def test_what_cannot_be_done_is_said() -> None:
    """Wrong arguments, an example that the model refuses, and a model that cannot be copied."""
    with pytest.raises(TypeError, match=r"fuse needs a torch\.nn\.Module, got function"):
        fuse(small)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="the example must be a tensor, or a tuple, list or dict of arguments, not 3"):
        fuse(small(), 3)  # type: ignore[arg-type]
    with pytest.raises(FusionError, match="Sequential fails on the example: RuntimeError: "):
        fuse(small(), X[:, :2])
    with pytest.raises(FusionError, match=r"copy.deepcopy\(\) fails on Sequential .* give lazy modules a first input"):
        fuse(nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match=r"this Sequential does not come from fuse\(\)"):
        fusion_report(small())


def test_it_works_inside_inference_mode() -> None:
    """The copy's parameters are ordinary ones, wherever it is made."""
    with torch.inference_mode():
        fused = fuse(small(), X)
    assert not any(parameter.is_inference() for parameter in fused.parameters())


def test_a_model_without_batchnorm_is_copied_and_nothing_reported() -> None:
    """There is nothing to fuse, and that is no error."""
    fused = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), X)
    assert fusion_report(fused).fused == ()
    assert fusion_report(fused).skipped == {}


def test_serving_fused_logs_what_was_fused_what_not_and_what_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """Who starts the server reads it there; the metrics count the hidden channels."""
    model = small()
    model[1].get_parameter("weight").data[2:] = 0.0
    source = loaded(model, TensorSpec("image", torch.float32, (-1, 3, 8, 8)))
    with caplog.at_level(logging.INFO):
        fused = fuse_loaded(source)
    assert [record.getMessage() for record in caplog.records] == [
        "net: 1 of 2 BatchNorm layers are fused",
        "not fused: 3, because it follows 2 (ReLU), not a convolution or linear layer",
        "fused layer 1: 2 channels are not monitored, as their weight is about 0",
    ]
    assert source.module is model
    runtime = Runtime(fused)
    runtime.start()
    outputs = runtime.infer({"image": X})
    torch.testing.assert_close(outputs["output"], answer(model, X), rtol=1e-5, atol=1e-5)
    snapshot = runtime.monitor.snapshot()
    assert snapshot.unobservable_channels == {"1": 2}
    assert [layer.name for layer in snapshot.layers] == ["1", "3"]
    text = Metrics(runtime).render().decode()
    assert 'guardserve_unobservable_channels{model="net"} 2.0' in text
    assert 'guardserve_batchnorm_layers{model="net",observed="true"} 2.0' in text


def test_serving_fused_checks_a_batch_of_one_too() -> None:
    """A forward that goes another way for one sample than for two is not served with the wrong answer."""

    class Single(Typed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y if x.shape[0] == 1 else self.norm(y)

    with pytest.raises(FusionError, match="differs"):
        fuse_loaded(loaded(trained(Single()), TensorSpec("image", torch.float32, (-1, 3, 8, 8))))


@pytest.mark.parametrize("arguments", [(), ("--fuse",)])
def test_the_command_line_serves_the_fused_copy_only_when_told_to(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --fuse every norm of the demo is served fused, and without it as it is."""
    served: list[Runtime] = []

    def stop(runtime: Runtime, **_: object) -> None:
        served.append(runtime)
        raise GuardserveError("far enough")

    monkeypatch.setattr(importlib.import_module("guardserve.cli.serve"), "create_app", stop)
    result = CliRunner().invoke(main, ["serve", "demo", *arguments])
    assert "far enough" in result.output
    (runtime,) = served
    layers = sum(isinstance(module, FusedBatchNorm) for module in runtime.guard.module.modules())
    assert layers == (len(runtime.monitor.layers) if arguments else 0)
    assert len(runtime.monitor.layers) > 0


def test_fusing_does_not_load_the_compiler() -> None:
    """A trace needs torch.fx only, which torch itself has loaded."""
    code = (
        "import sys, torch; from torch import nn; from guardserve.fusion import fuse;"
        "fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.zeros(1, 3, 8, 8)); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()
