"""What the layers of a forward write down, summed up where it is, in memory that stays bounded."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import Monitor, native
from guardserve.monitor import accumulation
from guardserve.observation import reading, sheets, workspace
from guardserve.observation.reading import Reading, plan_for
from guardserve.observation.record import Record
from guardserve.observation.taps import Taps
from guardserve.observation.workspace import Place, Workspace


def net(width: int = 6) -> nn.Sequential:
    """Return convolutions with BatchNorm, in eval mode, and a linear layer with it: cells of several sizes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * 64, 5),
        nn.BatchNorm1d(5),
    ).eval()


def mlp() -> nn.Sequential:
    """Return linear layers with BatchNorm, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()


def broken(_: torch.Tensor) -> torch.Tensor:
    """Fail."""
    raise RuntimeError("broken")


def interrupt(_: torch.Tensor) -> torch.Tensor:
    """Give up, as a user's Ctrl-C makes it."""
    raise KeyboardInterrupt


class Skipping(nn.Module):
    """Passes the second of three BatchNorm layers only for inputs whose sum is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass two layers or three."""
        for i, norm in enumerate(self.norms):
            if i != 1 or x.sum() > 0:
                x = norm(x)
        return x


@pytest.fixture
def records() -> Iterator[list[Record]]:
    """Yield a list for records, emptied at the end."""
    found: list[Record] = []
    yield found
    found.clear()


def exact(model: nn.Sequential, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return means and variances over all positions of what enters each BatchNorm layer, less its running mean."""
    means, variances = [], []
    for layer in model:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert layer.running_mean is not None
            values = x.double().reshape(len(x), x.shape[1], -1).numpy()
            means.append(values.mean(-1) - layer.running_mean.double().numpy())
            variances.append(values.var(-1))
        x = layer(x)
    return np.concatenate(means, 1), np.concatenate(variances, 1)


@pytest.mark.parametrize("samples", [1, 3, 20])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_what_waits_is_what_its_own_forward_showed(samples: int, offset: float, records: list[Record]) -> None:
    """Forwards that are looked at long after others of other inputs came: each has its own samples' figures."""
    model = net()
    taps = Taps(model, records.append, values=None)
    inputs = [torch.randn(samples, 3, 16, 16) + offset + i for i in range(6)]
    with torch.inference_mode():
        for x in inputs:
            model(x)
        taps.close()
        expected = [exact(model, x) for x in inputs]
    assert all(record.bundle is not None for record in records[1:])
    for record, (mean, variance) in zip(records[1:], expected[1:], strict=True):
        order = dict(record.parts())
        rows = [order[index] for index in sorted(order)]
        found = np.concatenate([row.mean for row in rows], 1)
        spread = np.concatenate([np.zeros_like(row.mean) if row.variance is None else row.variance for row in rows], 1)
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=2e-6 * (1 + offset))
        np.testing.assert_allclose(spread, variance, rtol=1e-4, atol=1e-5 * (1 + offset * 1e-3) ** 2)


def read(x: torch.Tensor, values: int | None, turn: int) -> Reading:
    """Read an activation by operations of torch's, in float64."""
    plan = plan_for(tuple(x.shape), x.stride(), values, len(x))
    anchor = torch.zeros(x.shape[1], *[1 for _ in plan.axes], dtype=torch.float64)
    return reading.read(0, x, plan, turn, anchor)


def assert_same(found: np.ndarray, expected: np.ndarray, deviation: np.ndarray, share: float = 5e-6) -> None:
    """Compare figures, to a share of a deviation; which of infinity and NaN one is tells nothing."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    away = np.abs(found[finite] - expected[finite]) / (deviation[finite] + np.abs(expected[finite]) + 1e-7)
    assert away.max(initial=0.0) <= share


def strided(x: torch.Tensor) -> torch.Tensor:
    """Let every other column be what it is, in memory of twice the width."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def stacked(x: torch.Tensor) -> torch.Tensor:
    """Let all samples be the first, with its memory."""
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": strided,
    "stacked": stacked,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", [None, 4 * 512, 4 * 60])
@pytest.mark.parametrize("size", [(64, 64), (12, 30), (7, 7), (1, 5), (1, 1)])
def test_slots_sum_up_what_operations_of_torchs_do(
    size: tuple[int, int], values: int | None, layout: str, dtype: torch.dtype, records: list[Record]
) -> None:
    """All positions and cells of them, with values that are constant, large, subnormal, infinite or NaN."""
    model = nn.Sequential(nn.BatchNorm2d(4, eps=0), nn.BatchNorm2d(4, eps=0)).eval()
    x = torch.randn(37, 4, *size) + 10 * torch.randn(37, 4, 1, 1)
    x[0], x[1] = 3.0, 1e3 * x[1]
    x[2, 0], x[3, 1], x[4] = torch.inf, torch.nan, 1e-7 * x[4]
    x = LAYOUTS[layout](x.to(dtype))
    taps = Taps(model, records.append, values=values)
    with torch.inference_mode():
        for _ in range(5):
            model(x)
    taps.close()
    laid_out = plan_for(tuple(x.shape), x.stride(), values, len(x)).uniform
    assert {isinstance(record.bundle, Workspace) for record in records[1:]} == {laid_out}
    for record in records[1:]:
        expected = read(x, values, record.turn)
        rows = dict(record.parts())[0]
        assert rows.variance is not None
        mean, spread = expected.total.flatten(1) / expected.count, expected.squares
        variance = torch.zeros_like(mean) if spread is None else spread.view_as(mean) / expected.count
        assert_same(rows.mean, mean.numpy(), variance.sqrt().numpy())
        assert_same(rows.variance, variance.numpy(), variance.numpy())


def assert_exact(x: torch.Tensor, records: list[Record]) -> None:
    """Compare what slots sum up of all positions of an input with float64."""
    model = nn.Sequential(nn.BatchNorm2d(x.shape[1]), nn.Identity(), nn.BatchNorm2d(x.shape[1])).eval()
    taps = Taps(model, records.append, values=None)
    with torch.inference_mode():
        for _ in range(2):
            model(x)
    taps.close()
    rows = dict(records[1].parts())[0]
    assert isinstance(records[1].bundle, Workspace)
    assert rows.variance is not None
    variance = x.double().var((2, 3), correction=0)
    assert_same(rows.mean, x.double().mean((2, 3)).numpy(), variance.sqrt().numpy())
    assert_same(rows.variance, variance.numpy(), variance.numpy())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_slots_are_exact_though_the_mean_be_many_deviations(offset: float, records: list[Record]) -> None:
    """Means ten thousand times the deviation, far from the running mean."""
    x = torch.randn(3, 8, 16, 16) + offset
    assert_exact(x, records)


@pytest.mark.parametrize("position", [0, 5, -1])
@pytest.mark.parametrize("value", [3.3, 50.0])
@pytest.mark.parametrize("size", [7, 64, 512])
def test_one_value_may_be_far_from_all_others(size: int, value: float, position: int, records: list[Record]) -> None:
    """The first one, too, from which deviations are taken."""
    x = 0.1 + 0.01 * torch.randn(2, 2, size, size)
    x.view(2, 2, -1)[..., position] = value
    assert_exact(x, records)


@pytest.fixture(params=[False, True], ids=["subnormal", "flushed"])
def flushing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the processor flush subnormal numbers to 0, or not."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor does not flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
def test_every_half_is_the_number_that_it_stands_for(records: list[Record]) -> None:
    """All 65,536 of them, as torch converts them."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(2, -1)
    model = nn.Sequential(nn.BatchNorm1d(2**15), nn.Identity(), nn.BatchNorm1d(2**15)).eval()
    taps = Taps(model, records.append)
    with torch.inference_mode():
        for _ in range(2):
            model[0](x), model(x)
    taps.close()
    rows = dict(records[-1].parts())[0]
    assert isinstance(records[-1].bundle, Workspace)
    assert_same(rows.mean, x.float().numpy(), np.zeros(x.shape), share=0)


def test_a_slot_refuses_what_it_is_not_for() -> None:
    """It tells so, and leaves what it has; what is no tensor of its kind is never looked into."""
    x = torch.randn(2, 3, 4, 4)
    plan = plan_for(x.shape, x.stride(), None, 2)
    place = Place(0, x.shape, x.stride(), plan, torch.zeros(3, 1, 1))
    memory = np.full(2**12, 7, np.float32)
    ((slot,), (other,)) = [Workspace([place], 1).slots(values) for values in (memory, memory.copy())]
    assert slot is not None
    assert other is not None
    unfit: list[Any] = [
        x.double(),
        x[:1],
        x.contiguous(memory_format=torch.channels_last),
        x.to("meta"),
        nn.Parameter(x),
        torch._neg_view(x),
        torch._efficientzerotensor(x.shape),  # these have no memory
        torch._to_functional_tensor(x),
        torch._to_functional_tensor(torch.cat([x, x])[1:3]),
        torch.frombuffer(bytearray(x.nbytes + 1), dtype=torch.float32, offset=1, count=x.numel()).view(x.shape),
        x.numpy(),
        None,
    ]
    for value in unfit:
        assert not slot.take(value, 0)
    assert slot.turn == -1
    assert (memory == 7).all()
    assert slot.take(x, 0)
    assert not slot.take(x, 0), "it has this forward's"
    assert slot.take(x.clone().requires_grad_(), 1)
    with pytest.raises(ValueError, match="counted from 0"):
        slot.take(x, -1)
    with pytest.raises(TypeError):
        slot.take(x)  # type: ignore[call-arg]
    assert (other.turn, slot.turn) == (-1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (2,) * 9, "stride": (1,) * 9},
        {"stride": (4, 1)},
        {"axes": np.array([4, 2, 0, 1, 2, 1, 0, 4]).tobytes()},
        {"axes": np.array([4, 2, 0, 1]).tobytes()},
        {"axes": np.array([0, 1, 0]).tobytes()},
        {"rowed": 2},
        {"positions": 0},
        {"row": 0},
    ],
)
def test_cells_that_would_be_read_amiss_are_refused(wrong: dict[str, Any]) -> None:
    """Their makers have sums to get right; what is compiled must not read what is not there."""
    axes = np.array([4, 2, 0, 1, 0, 1, 0, 1]).tobytes()
    strips = np.zeros(1, np.int64).tobytes()
    right: dict[str, Any] = {"shape": (2, 3, 4), "stride": (12, 4, 1), "samples": 2, "outer": 12, "strips": strips}
    right |= {"length": 2, "step": 2, "axes": axes, "rowed": 1, "positions": 4, "turning": 3, "row": 2, "hop": 1}
    right |= {"behind": 1}
    native.Cells(**right)
    with pytest.raises(ValueError, match=r"axes"):
        native.Cells(**right | wrong)


OLDER = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__  # torch before 2.10 has none
import pytest
raise SystemExit(pytest.main([{path!r}, "-q", "-k", "slots or refuses or half or waits", "-p", "no:cacheprovider"]))
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch is older than 2.10")
def test_all_is_the_same_where_tensors_do_not_lend_what_they_are() -> None:
    """Then they are asked for each part of it."""
    code = OLDER.format(path=__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(("samples", "waiting"), [(1, 3), (200, 0)])
def test_so_many_may_wait_and_no_more(
    samples: int, waiting: int, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What those beyond the limit showed is copied at once. Records that nobody looks at give back what they hold."""
    monkeypatch.setattr(sheets, "MOST_WAITING", 3 * 2**12)
    model, x = net(), torch.randn(samples, 3, 16, 16)
    taps = Taps(model, records.append)
    with torch.inference_mode():
        for _ in range(20):
            model(x)
        assert sum(record.sheet is not None for record in records) == waiting
        (shelf,) = taps._sheets._shelves.values()
        assert len(shelf.waiting) == waiting
        records.clear()
        gc.collect()
        assert not shelf.waiting
        before = len(shelf.free)
        for _ in range(20):
            model(x)
            records.clear()
        assert len(shelf.free) == before <= 4
        monkeypatch.setattr(model, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            model(x)
        assert len(shelf.free) == before
    taps.close()


def test_what_cannot_share_a_buffer_waits_in_two_arrays_and_not_in_many_tensors(records: list[Record]) -> None:
    """In float64 layers are summed up as they run; the figures are each layer's own all the same."""
    model, x = net().double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    taps = Taps(model, records.append, values=None)
    with torch.inference_mode():
        model(x)
        model(x)
        taps.close()
        mean, variance = exact(model, x)
    for record in records:
        assert not record.readings
        assert record.sheet is None
        assert record.order == record.route == (0, 1, 2)
        rows = [row for _, row in record.parts()]
        np.testing.assert_allclose(np.concatenate([row.mean for row in rows], 1), mean, atol=1e-12)
        spread = np.concatenate([np.zeros_like(row.mean) if row.variance is None else row.variance for row in rows], 1)
        np.testing.assert_allclose(spread, variance, atol=1e-12)


def test_a_forward_that_skips_a_layer_is_seen_by_the_others() -> None:
    """It cannot be laid out as the ones before it, and nothing of those is taken for its own."""
    model = Skipping().eval()
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(3):
            model(torch.ones(2, 4))
        model(-torch.ones(2, 4))
        snapshot = monitor.snapshot()
    assert {layer.name: layer.samples for layer in snapshot.layers} == {"norms.0": 8, "norms.1": 6, "norms.2": 8}
    first, second, _ = snapshot.layers
    assert first.mean_shift == pytest.approx(0.5, rel=1e-4)
    assert second.mean_shift == pytest.approx(1.0, rel=1e-4)


def seen(monitor: Monitor) -> list[int]:
    """Return how many samples each layer has seen."""
    return [layer.samples for layer in monitor.snapshot().layers]


def test_layers_go_the_quick_way_to_their_slots() -> None:
    """Once a forward has shown where to read, no look is needed for one like it."""
    model, x = mlp(), torch.randn(3, 8)
    with Monitor(model) as monitor, torch.inference_mode():
        model(x)
        for layer in (model[1], model[3]):
            vars(layer)["_check_input_dim"].looks = (broken,)
        for _ in range(40):
            model(x)
        assert seen(monitor) == [123, 123]
        with pytest.raises(RuntimeError, match="broken"):
            model(x[:1])


def test_monitors_of_a_model_and_of_its_parts_see_all_of_it() -> None:
    """Whoever comes or goes, and in whichever order forwards begin and end within each other."""
    model, x = nn.Sequential(mlp(), nn.Linear(16, 8), mlp()), torch.randn(2, 8)
    whole, part, twin = Monitor(model), Monitor(model[0]), Monitor(model)
    with torch.inference_mode():
        for _ in range(10):
            model(x)
        twin.close()
        part.close()
        for _ in range(10):
            model(x)
    assert [seen(monitor) for monitor in (whole, part, twin)] == [[40] * 4, [20] * 2, [20] * 4]
    whole.close()


def test_what_is_read_turns_by_the_forwards_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where seven shapes come in turns, each layer's seven cells are read all the same."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    inputs = [torch.zeros(samples, 2, 14, 14) for samples in range(1, 8)]
    for x in inputs:
        x.view(-1, 196)[:, :] = torch.arange(196.0)
    records: list[Record] = []
    monkeypatch.setattr(reading, "MIN_POSITIONS", 1)
    taps = Taps(model, records.append, values=56)
    with torch.inference_mode():
        for x in inputs * 196:
            model(x)
    taps.close()
    for samples in range(1, 8):
        rows = [dict(record.parts())[0] for record in records if record.samples == samples]
        assert len(rows) == 196
        assert np.mean([row.mean for row in rows]) == pytest.approx(97.5, rel=1e-6)


def test_inputs_of_many_axes_are_read_without_slots() -> None:
    """As those of layers that take any number."""
    model = nn.Sequential(nn.SyncBatchNorm(2), nn.SyncBatchNorm(2)).eval()
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(5):
            model(torch.randn(2, 2, *[1] * 8))
        assert seen(monitor) == [10, 10]


def test_monitors_that_close_in_the_midst_of_forwards_leave_nothing() -> None:
    """Their slots go with them, and the forward's other monitor sees it whole."""
    model, x = mlp(), torch.randn(2, 8)
    monitors = [Monitor(model) for _ in range(2)]
    owners = [weakref.ref(monitor._taps) for monitor in monitors]

    def close(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        del args
        if len(monitors) == 2 and seen(monitors[0]):
            monitors.pop().close()

    with torch.inference_mode():
        model[2].register_forward_pre_hook(close)
        for _ in range(5):
            model(x)
        assert seen(monitors[0]) == [10, 10]
        gc.collect()
        assert [owner() is None for owner in owners] == [False, True]
    monitors.pop().close()


def test_transformed_forwards_show_nothing_and_spoil_nothing() -> None:
    """Not in memory that the thread keeps either."""
    model, x = mlp(), torch.randn(2, 8)
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(2):
            torch.func.functionalize(model)(x)
            torch.vmap(model)(x[None])
        for _ in range(3):
            model(x)
        layers = monitor.snapshot().layers
    with Monitor(model) as other, torch.inference_mode():
        for _ in range(3):
            model(x)
        assert [layer.mean_shift for layer in layers] == [layer.mean_shift for layer in other.snapshot().layers]
        assert seen(other) == [layer.samples for layer in layers] == [6, 6]


class Calling(nn.Module):
    """Calls a model that is no part of it, in between its layers or behind them."""

    def __init__(self, other: nn.Module, *, behind: bool) -> None:
        super().__init__()
        self.layers = mlp()
        self._other = (other,)  # in a tuple, or it would be a part
        self._behind = behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass its layers."""
        y: torch.Tensor = self.layers[:2](x)
        if self._behind:
            y = self.layers[2:](y)
        with contextlib.suppress(KeyboardInterrupt):
            self._other[0](x)
        return y if self._behind else self.layers[2:](y)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("behind", [False, True])
def test_a_model_that_another_calls_takes_nothing_from_it(
    behind: bool, interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each monitor has its own, also where the model that was called gives up."""
    other, x = mlp(), torch.randn(2, 8)
    model = Calling(other, behind=behind).eval()
    with Monitor(model) as monitor, Monitor(other) as its, torch.inference_mode():
        other(x)
        if interrupted:
            monkeypatch.setattr(other[2], "forward", interrupt)
        for _ in range(10):
            model(x)
        assert seen(monitor) == [20, 20]
        assert seen(its) == [2 if interrupted else 22] * 2


def test_a_forward_that_was_given_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a thread does afterwards is not taken for a part of it."""
    model, x = mlp(), torch.randn(2, 8)

    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(3):
            model(x)
        with monkeypatch.context() as patch:
            patch.setattr(model[2], "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
        for _ in range(3):
            model(x)
        assert seen(monitor) == [12, 12]


def test_forwards_of_one_way_too_many_are_counted_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether layers are kept side by side or not, each has all samples."""
    monkeypatch.setattr(accumulation, "ROUTES", 0)
    model = mlp()
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(5):
            model(torch.randn(3, 8))
        snapshot = monitor.snapshot()
    assert [layer.samples for layer in snapshot.layers] == [15, 15]


@pytest.mark.parametrize("build", [net, Skipping])
def test_a_large_forward_is_read_in_memory_that_the_thread_keeps_and_its_record_in_its_own(
    build: Callable[[], nn.Module], records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is not written over by the forwards that follow, however they go."""
    monkeypatch.setattr(workspace, "MOST_VALUES", 0)
    model = build().eval()
    shape = (4, 4) if build is Skipping else (4, 3, 16, 16)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    taps = Taps(model, records.append, None)
    with torch.inference_mode():
        for x in inputs:
            model(x)
        together = [record.parts() for record in records]
        records.clear()
        for x in inputs:
            model(x)
            (record,) = records
            alone = record.parts()
            assert [index for index, _ in alone] == [index for index, _ in together[0]]
            for (_, one), (_, other) in zip(alone, together.pop(0), strict=True):
                np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5, atol=1e-6)
                assert (one.variance is None) == (other.variance is None)
                if one.variance is not None and other.variance is not None:
                    np.testing.assert_allclose(one.variance, other.variance, rtol=1e-5, atol=1e-6)
            records.clear()
    taps.close()


def test_without_what_is_compiled_layers_are_read_all_the_same() -> None:
    """And the log says that it takes longer."""
    code = """
import logging, sys
sys.modules["guardserve.native"] = None
logging.basicConfig(level="INFO")
import torch
from guardserve import Monitor
model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)).eval()
with Monitor(model) as monitor, torch.inference_mode():
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8))
    print([layer.samples for layer in monitor.snapshot().layers])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[6, 6]"
    assert done.stderr.count("install guardserve again where there is a C compiler") == 1
