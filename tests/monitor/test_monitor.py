"""Monitor: attachment, accumulation against float64 numpy, windows, threads and effect sizes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
from collections import defaultdict
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from guardserve import EvalGuard, Monitor, trace_nonfinite
from guardserve.monitor import LayerShift
from guardserve.observation.taps import Taps


class SubclassedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, as timm has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, then clip."""
        return super().forward(x).relu_()


class Every(nn.Module):
    """Every kind of BatchNorm layer, one of them called with a keyword and one run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.BatchNorm2d(3)
        self.sub = SubclassedBatchNorm(3)
        self.sync = nn.SyncBatchNorm(3)
        self.three = nn.BatchNorm3d(3)
        self.one = nn.BatchNorm1d(3)
        self.lazy = nn.LazyBatchNorm1d()
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run them all, shape ``(N, 3, H, W)``."""
        x = self.sync(self.sub(self.two(self.instance(x))))
        x = self.three(x[:, :, None]).squeeze(2).mean((2, 3))
        y: torch.Tensor = self.lazy(self.one(self.one(input=x)))
        return y


def trained(seed: int = 0) -> nn.Sequential:
    """Return a small convolutional model whose running statistics fit standard normal input."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )
    for _ in range(40):
        model(torch.randn(64, 3, 8, 8))
    return model.eval()


def hooks(model: nn.Module) -> int:
    """Count the hooks on a model, and the layers that are looked at without one."""
    looked_at = sum("_check_input_dim" in vars(m) for m in model.modules())
    return looked_at + sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def exact(layer: Any, inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the three effect sizes of each channel in float64 with numpy, all positions of all samples at once."""
    x = inputs.double().transpose(0, 1).flatten(1).numpy()
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    scale = np.sqrt(var + layer.eps)
    shift = (x.mean(1) - mean) / scale
    ratio = np.log(np.sqrt(x.var(1) + layer.eps) / scale)
    wasserstein2 = np.sqrt(shift**2 + ((x.std(1) - np.sqrt(var)) / scale) ** 2)
    return shift, ratio, wasserstein2


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def captured(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return everything that entered each BatchNorm layer, read by hooks of the test's own."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("before", [0, 3])
def test_a_model_that_is_moved_to_meta_shows_nothing_and_breaks_nothing(before: int) -> None:
    """Its tensors hold no values, nor do its statistics."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(144)).eval()
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(before):
            model(torch.randn(2, 3, 8, 8))
        model.to("meta")
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8, device="meta"))
        assert not monitor.snapshot().layers
        assert not monitor.unobservable_channels
        assert monitor.verdict().state == "warming"


def test_it_attaches_to_every_kind_and_removes_itself_wholly() -> None:
    """1d, 2d, 3d, Sync, lazy and subclasses are watched; InstanceNorm is not; nothing stays after close."""
    model = Every().eval()
    with Monitor(model) as monitor:
        assert monitor.layers == ("two", "sub", "sync", "three", "one", "lazy")
        model(torch.randn(5, 3, 4, 4))
        snapshot = monitor.snapshot()
        assert {layer.name: layer.samples for layer in snapshot.layers} == {
            "two": 5, "sub": 5, "sync": 5, "three": 5, "one": 10, "lazy": 5,
        }  # fmt: skip
        assert snapshot.samples == 5
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), Monitor(model):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_a_layer_without_running_statistics_is_said_to_be_unobserved() -> None:
    """What cannot be watched is named with the reason, not passed over."""
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)).eval()
    with Monitor(model) as monitor:
        assert monitor.layers == ("1",)
        assert monitor.unobserved == {"0": "it keeps no running statistics (track_running_stats=False)"}
        assert monitor.snapshot().unobserved == monitor.unobserved


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(-3, 3), st.floats(0.1, 5))
def test_effect_sizes_equal_float64_numpy_however_requests_are_batched(
    sizes: list[int], offset: float, spread: float
) -> None:
    """The accumulated effect sizes are those of the whole stream, computed at once in float64."""
    model = trained()
    generator = torch.Generator().manual_seed(len(sizes))
    batches = [torch.randn(n, 3, 8, 8, generator=generator) * spread + offset for n in sizes]
    with Monitor(model) as monitor, torch.no_grad():
        for batch in batches:
            model(batch)
        snapshot = monitor.snapshot()
    assert snapshot.samples == sum(sizes)
    for layer in snapshot.layers:
        shift, ratio, wasserstein2 = exact(model.get_submodule(layer.name), captured(model, batches)[layer.name])
        assert layer.mean_shift == pytest.approx(rms(shift), rel=1e-5, abs=1e-6)
        assert layer.log_std_ratio == pytest.approx(rms(ratio), rel=1e-5, abs=1e-6)
        assert layer.wasserstein2 == pytest.approx(rms(wasserstein2), rel=1e-5, abs=1e-6)
        order = np.argsort(-wasserstein2)[: len(layer.worst_channels)]
        assert [channel.channel for channel in layer.worst_channels] == order.tolist()
        for channel in layer.worst_channels:
            assert channel.mean_shift == pytest.approx(shift[channel.channel], rel=1e-5, abs=1e-6)


def test_dead_and_nearly_dead_channels_that_fit_are_no_shift() -> None:
    """A channel with running variance 0 that stays constant is where it should be, and all stays finite."""
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    model[0].get_buffer("running_var")[0] = 0.0
    x = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.0
    with Monitor(model) as monitor, torch.no_grad():
        model(x)
        (layer,) = monitor.snapshot().layers
    assert layer.wasserstein2 < 0.05
    assert layer.log_std_ratio < 0.05


def test_a_channel_that_dies_shows_as_a_narrower_spread() -> None:
    """A dead sensor's constant channel is the worst one, with a negative log ratio and finite figures."""
    model = trained()
    entering = model[0](torch.randn(80, 3, 8, 8)).detach()
    entering[:, 5] = 0.0
    with Monitor(model) as monitor, torch.no_grad():
        model[1](entering)
        worst = monitor.snapshot().layers[0].worst_channels[0]
    assert worst.channel == 5
    assert worst.log_std_ratio < -1
    assert math.isfinite(worst.log_std_ratio)


def test_non_finite_activations_are_counted_and_poison_nothing() -> None:
    """A NaN sample is left out of the moments, and counted at each layer that it reached."""
    model = trained()
    clean = torch.randn(20, 3, 8, 8)
    with Monitor(model) as monitor, torch.no_grad():
        model(clean)
        before = monitor.snapshot()
        bad = torch.full((2, 3, 8, 8), float("nan"))
        bad[1] = float("inf")
        model(bad)
        after = monitor.snapshot()
    assert [layer.nonfinite_samples for layer in before.layers] == [0, 0]
    assert [layer.nonfinite_samples for layer in after.layers] == [2, 2]
    assert [layer.wasserstein2 for layer in after.layers] == [layer.wasserstein2 for layer in before.layers]


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 4), (1, 3, 20, 20)])
@pytest.mark.parametrize("size", [1e18, 1e20, 1e30])
def test_finite_values_however_large_are_a_shift_or_counted(shape: tuple[int, ...], size: float) -> None:
    """One channel explodes: what has no finite square counts as not finite, and later samples are judged as ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)).eval()
    with Monitor(model, values=None) as monitor, torch.inference_mode():
        for i in range(4):
            x = torch.randn(shape)
            x[:, 1] *= size if i < 2 else 1
            model(x)
        (layer,) = monitor.snapshot().layers
        if layer.nonfinite_samples == 0:
            assert layer.wasserstein2 > size / 100
        else:
            assert layer.nonfinite_samples == 2 * shape[0]
            assert layer.wasserstein2 < 1
            assert len(layer.worst_channels) == 3


def test_a_batch_whose_first_sample_is_far_off_has_the_spread_that_it_has() -> None:
    """Thousands of samples, nowhere near the first."""
    torch.manual_seed(0)
    x = torch.randn(5000, 2)
    x[0] = 1e5
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0)).eval()
    with Monitor(model) as monitor, torch.inference_mode():
        model(x)
        (layer,) = monitor.snapshot().layers
    mean, spread = x.double().mean(0), x.double().std(0, correction=0)
    expected = ((mean.square() + (spread - 1).square()).mean()).sqrt()
    assert layer.wasserstein2 == pytest.approx(float(expected), rel=1e-4)


def test_only_non_finite_activations_give_no_worst_layer() -> None:
    """With nothing finite to compare there is no score, rather than a NaN one."""
    model = trained()
    with Monitor(model, min_samples=1) as monitor, torch.no_grad():
        model(torch.full((2, 3, 8, 8), float("nan")))
        assert monitor.snapshot().worst_layer is None
        assert monitor.verdict().state == "blind"


def test_the_window_forgets_and_the_total_does_not() -> None:
    """After a shift ends, the recent window is clean again while the total still tells of it."""
    model = trained()
    torch.manual_seed(1)
    with Monitor(model, window=64, min_samples=32) as monitor, torch.no_grad():
        assert monitor.verdict().state == "warming"
        for _ in range(8):
            model(torch.randn(16, 3, 8, 8))
        assert monitor.verdict().state == "ok"
        for _ in range(8):
            model(torch.randn(16, 3, 8, 8) * 4)
        shifted = monitor.verdict()
        assert shifted.state == "shifted"
        assert shifted.layer in monitor.layers
        assert shifted.score is not None
        assert shifted.score > 1
        for _ in range(8):
            model(torch.randn(16, 3, 8, 8))
        assert monitor.verdict().state == "ok"
        total = monitor.snapshot().worst_layer
        recent = monitor.verdict().window
        assert isinstance(total, LayerShift)
        assert total.wasserstein2 > 0.4
        assert 64 <= recent.samples <= 64 + 16
        monitor.reset()
        assert monitor.snapshot().samples == 0
        assert monitor.snapshot().layers == ()


def test_many_threads_lose_no_sample_and_count_none_twice() -> None:
    """Eight threads give exactly the statistics of the same requests one by one."""
    model = trained()
    batches = [torch.randn(1 + i % 3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(160)]
    guard = EvalGuard(model)
    with Monitor(model) as monitor:
        for batch in batches:
            guard(batch)
        alone = monitor.snapshot()
        monitor.reset()
        threads = [
            threading.Thread(target=lambda part=batches[i::8]: [guard(batch) for batch in part]) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = monitor.snapshot()
    assert together.samples == alone.samples == sum(len(batch) for batch in batches)
    for a, b in zip(alone.layers, together.layers, strict=True):
        assert a.samples == b.samples
        assert b.wasserstein2 == pytest.approx(a.wasserstein2, rel=1e-6)  # another order rounds otherwise


def test_forwards_that_fail_or_only_look_are_left_out() -> None:
    """A forward that raises has served no sample, and tracing a NaN runs the model once more for nobody."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.bn(x)
            if x[0, 0] > 10:
                raise ValueError("too large")
            return y.log()

    model = Fragile().eval()
    with Monitor(model) as monitor, torch.no_grad():
        with pytest.raises(ValueError, match="too large"):
            model(torch.full((2, 3), 11.0))
        assert monitor.snapshot().samples == 0
        origin = trace_nonfinite(model, torch.full((2, 3), -1.0))
        assert origin is not None
        assert monitor.snapshot().samples == 0
        model(torch.ones(2, 3))
        assert monitor.snapshot().samples == 2


def test_a_part_called_by_itself_is_seen() -> None:
    """Calling a submodule directly, past the model's own forward, loses nothing."""
    model = trained()
    with Monitor(model) as monitor, torch.no_grad():
        model[1](torch.randn(7, 8, 3, 3))
        assert [(layer.name, layer.samples) for layer in monitor.snapshot().layers] == [("1", 7)]


def test_a_channel_whose_statistics_are_not_finite_blinds_no_other() -> None:
    """An infinite running variance, as a cast to half leaves it, is left out and counted."""
    model = trained()
    model.get_buffer("1.running_var")[0] = float("inf")
    with Monitor(model) as monitor, torch.no_grad():
        model(torch.randn(80, 3, 8, 8) * 4)
        snapshot = monitor.snapshot()
        assert monitor.verdict().state == "shifted"
    assert math.isfinite(snapshot.layers[0].wasserstein2)
    assert 0 not in [channel.channel for channel in snapshot.layers[0].worst_channels]
    assert snapshot.unobservable_channels == {"1": 1}


def test_parts_called_one_after_the_other_count_each_sample_once() -> None:
    """A caller who runs a model's parts in turn sees as many samples as it sent."""
    model = trained()
    with Monitor(model) as monitor, torch.no_grad():
        for _ in range(3):
            x = torch.randn(10, 3, 8, 8)
            for part in model:
                x = part(x)
        assert monitor.snapshot().samples == 30


def test_rows_laid_out_of_one_sample_count_as_its_positions() -> None:
    """Frames that a model moves into the batch are no samples of their own."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.bn(x.flatten(0, 1))
            return y

    model = Frames().eval()
    x = torch.randn(6, 5, 3)
    with Monitor(model) as monitor, torch.no_grad():
        model(x)
        (layer,) = monitor.snapshot().layers
        assert (layer.samples, monitor.snapshot().samples) == (6, 6)
    shift = x.double().mean((0, 1)) / (1 + model.bn.eps) ** 0.5
    assert layer.mean_shift == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-5)


def test_a_layer_that_loses_its_statistics_fails_no_forward() -> None:
    """What can no longer be read is left out; answers and snapshots go on."""
    model = trained()
    with Monitor(model) as monitor, torch.no_grad():
        model[1].register_buffer("running_mean", None)
        model[1].register_buffer("running_var", None)
        for _ in range(5):
            model(torch.randn(16, 3, 8, 8))
        assert [layer.name for layer in monitor.snapshot().layers] == ["4"]


def test_a_subclass_that_turns_its_input_round_is_left_out_and_named() -> None:
    """An input with another number of channels cannot be compared, and stops neither answers nor snapshots."""

    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(ChannelsLast(8)).eval()
    with Monitor(model) as monitor, torch.no_grad():
        for _ in range(40):
            assert model(torch.randn(2, 6, 8)).shape == (2, 6, 8)
        assert monitor.snapshot().layers == ()
        assert "0" in monitor.unobserved


def test_copies_of_a_monitored_model_are_ordinary_and_a_forgotten_monitor_lets_go() -> None:
    """A copy or pickle carries no monitor, and a monitor that is garbage leaves no hook."""
    model = trained()
    monitor = Monitor(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        other(torch.randn(4, 3, 8, 8))
    assert monitor.snapshot().samples == 0
    del monitor
    gc.collect()
    assert hooks(model) == 0


def test_wrong_arguments_are_named() -> None:
    """The window must be able to hold what it is judged on, and a threshold is positive."""
    with pytest.raises(ValueError, match=r"min_samples=65, window=64"):
        Monitor(nn.BatchNorm1d(2), window=64, min_samples=65)
    with pytest.raises(ValueError, match=r"threshold=0"):
        Monitor(nn.BatchNorm1d(2), threshold=0)


class Stores(nn.Module):
    """Returns nothing: what it finds is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.found: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> None:
        """Normalise, and refuse what is negative."""
        self.found.append(self.bn(x))
        if bool((x < 0).any()):
            raise ValueError("negative")


def test_a_forward_that_returns_nothing_has_seen_its_samples() -> None:
    """One that raises has not."""
    model = Stores().eval()
    with Monitor(model) as monitor, torch.inference_mode():
        model(torch.ones(5, 3))
        with pytest.raises(ValueError, match="negative"):
            model(-torch.ones(7, 3))
        model(torch.ones(2, 3))
        assert monitor.snapshot().samples == 7


@pytest.mark.parametrize("method", ["_opened", "_finish"])
def test_a_fault_of_the_monitor_costs_no_answer(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever fails around a forward, it is told of once, and later forwards are seen."""
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    with Monitor(model) as monitor, torch.inference_mode():
        with mock.patch.object(Taps, method, side_effect=MemoryError("none left")):
            assert len(model(torch.ones(5, 3))) == 5
            assert len(model(torch.ones(5, 3))) == 5
        model(torch.ones(2, 3))
        assert monitor.snapshot().samples == 2
    assert caplog.text.count("cannot be monitored") == 1


def test_inputs_by_name_are_read_like_those_by_position() -> None:
    """Forward after forward, as the first ones settle how later ones are read."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    inputs = [torch.randn(2, 3, 5, 5) for _ in range(4)]
    with torch.inference_mode():
        with Monitor(model, values=None) as monitor:
            for image in inputs:
                model(image)
            positional = monitor.snapshot()
        with Monitor(model, values=None) as monitor:
            for image in inputs:
                model(input=image)
            named = monitor.snapshot()
    assert named.samples == positional.samples == 8
    for a, b in zip(named.layers, positional.layers, strict=True):
        assert a.mean_shift == pytest.approx(b.mean_shift)
        assert a.log_std_ratio == pytest.approx(b.log_std_ratio)


class Halving(nn.Module):
    """Takes large batches in halves, by calling itself, and normalises their features together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(3)
        self.head = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, shape ``(N, 3)``."""
        x = self.stem(x)
        if len(x) > 2:
            half = len(x) // 2
            x = torch.cat([self(x[:half]), self(x[half:])])
        if bool((x > 100).any()):
            raise ValueError("no such features")
        y: torch.Tensor = self.head(x)
        return y


def test_a_model_that_calls_itself_is_seen_once_with_all_that_its_layers_took() -> None:
    """Also after such a forward was given up, however deep it was."""
    model = Halving().eval()
    with Monitor(model) as monitor, torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3))
        for error, x in ((ValueError, torch.randn(8, 3) + 1000), (KeyboardInterrupt, torch.randn(8, 3))):
            with mock.patch.object(model.head, "forward", side_effect=error), pytest.raises(error):
                model(x)
        model(torch.randn(8, 3))
        snapshot = monitor.snapshot()
    assert snapshot.samples == 32
    assert {layer.name: layer.samples for layer in snapshot.layers} == {"stem": 4 * 24, "head": 4 * 24}


def test_a_layer_that_is_read_again_is_no_longer_called_unobserved() -> None:
    """And the reason is one line while it is."""
    model = trained()
    fault = RuntimeError("no\nreading\nof it")
    with Monitor(model) as monitor, torch.no_grad():
        with mock.patch("guardserve.observation.taps.plan_for", side_effect=fault):
            model(torch.randn(2, 3, 8, 8))
        assert monitor.unobserved == dict.fromkeys(("1", "4"), "it could not be read: RuntimeError: no")
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8))
        assert monitor.unobserved == {}
