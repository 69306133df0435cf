"""What the layers of a small forward write down: summed up later, by whoever asks, with memory that stays bounded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from guardserve import Monitor
from guardserve.monitor import accumulation
from guardserve.observation import sheets, workspace
from guardserve.observation.reading import Rows
from guardserve.observation.record import Record, sum_up
from guardserve.observation.taps import Taps


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
    """Forwards that are summed up long after others of other inputs came: each has its own samples' figures."""
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("values", [None, 4 * 512])
def test_what_is_summed_up_at_once_is_what_is_copied_and_summed_up_later(
    values: int | None, memory_format: torch.memory_format, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations and cells of them, of several samples, with values that are constant, large, infinite or NaN."""
    model = nn.Sequential(nn.BatchNorm2d(4, eps=0), nn.BatchNorm2d(4, eps=0)).eval()
    torch.manual_seed(0)
    x = torch.randn(6, 4, 64, 64) + 10 * torch.randn(6, 4, 1, 1)
    x[0], x[1] = 3.0, 1e15 * x[1]
    x[2, 0], x[3, 1] = torch.inf, torch.nan
    x = x.contiguous(memory_format=memory_format)
    shown: list[list[dict[int, Rows]]] = []
    for most in (workspace.MOST_CHANNELS, 0):
        monkeypatch.setattr(workspace, "MOST_CHANNELS", most)
        taps = Taps(model, records.append, values=values)
        with torch.inference_mode():
            for _ in range(5):
                model(x)
        taps.close()
        summed = memory_format is torch.contiguous_format and most > 0
        size = 2 * 6 * 8 if summed else 6 * 8 * (512 if values else 4096)
        assert {getattr(record.bundle, "values", None) for record in records[1:]} == {size}
        shown.append([dict(record.parts()) for record in records[1:]])
        records.clear()
    for at_once, later in zip(*shown, strict=True):
        for index, rows in at_once.items():
            variance, expected = rows.variance, later[index].variance
            assert variance is not None
            assert expected is not None
            np.testing.assert_allclose(rows.mean, later[index].mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(variance, expected, rtol=1e-4)


@pytest.mark.parametrize(("build", "fewest", "waiting"), [(net, 3, 3), (net, 4, 0), (mlp, 4, 3)])
def test_so_many_may_wait_and_no_more(
    build: Callable[[], nn.Module],
    fewest: int,
    waiting: int,
    records: list[Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those beyond the limit sum themselves up at once, and all do where so few would be summed up together.

    Those whose layers have one position wait in any case. Records that nobody looks at give back what they hold.
    """
    monkeypatch.setattr(sheets, "MOST_WAITING", 3 * 2**12)
    monkeypatch.setattr(sheets, "FEWEST_WAITING", fewest)
    model = build()
    x = torch.randn(1, 8) if build is mlp else torch.randn(1, 3, 16, 16)
    taps = Taps(model, records.append)
    with torch.inference_mode():
        for _ in range(20):
            model(x)
        assert sum(record.sheet is not None for record in records) == waiting
        shelf = taps._sheets._shelves[2**12]
        assert len(shelf.waiting) == waiting
        records.clear()
        gc.collect()
        assert not shelf.waiting
        before = len(shelf.free)
        for _ in range(20):
            model(x)
            records.clear()
        assert len(shelf.free) == before <= 6  # made three at a time, for three that wait and one that runs
        monkeypatch.setattr(model, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            model(x)
        assert len(shelf.free) == before
    taps.close()


@pytest.mark.parametrize("samples", [1, 3, 20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forwards_that_are_summed_up_together_come_to_what_each_does_alone(
    samples: int, memory_format: torch.memory_format, records: list[Record]
) -> None:
    """Of several shapes mixed, in any order, and with some between them that are summed up already or dropped."""
    model: nn.Module = net().to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = [torch.randn(samples + i % 2, 3, 16, 16).contiguous(memory_format=memory_format) + i for i in range(40)]
    shown = []
    for together in (False, True):
        taps = Taps(model, records.append)
        with torch.inference_mode():
            for x in inputs:
                model(x)
                if not together:
                    records[-1].rows()
        taps.close()
        assert (sum(record.sheet is not None for record in records) >= 8) == together
        del records[7]
        records[11].rows()
        order = [(17 * i) % len(records) for i in range(len(records))]
        sum_up([records[i] for i in order])
        assert not any(record.sheet for record in records)
        shown.append([record.rows() for record in records])
        records.clear()
    for alone, other in zip(*shown, strict=True):
        np.testing.assert_allclose(other.mean, alone.mean, rtol=1e-6, atol=1e-7)
        if alone.variance is not None and other.variance is not None:
            np.testing.assert_allclose(other.variance, alone.variance, rtol=1e-6, atol=1e-7)


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
