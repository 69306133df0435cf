"""What is read of an activation: against float64 numpy, without bias, and how far it is from reading all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardserve.observation.reading import FEW_POSITIONS, MIN_POSITIONS, Plan, Scratch, read, side_by_side

SHAPES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
)
EPSILON = {torch.float64: 2e-16, torch.float32: 1.2e-7, torch.float16: 1.2e-7, torch.bfloat16: 1.2e-7}


def observe(
    x: torch.Tensor,
    anchor: torch.Tensor,
    values: int | None = None,
    turn: int = 0,
    samples: int | None = None,
    *,
    scratch: Scratch | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return mean over positions relative to the anchor, variance, and the number of positions that were read."""
    plan = Plan(x.shape, x.stride(), values, samples)
    reading = read(0, x, plan, turn, anchor.reshape(-1, *[1 for _ in plan.axes]), scratch=scratch)
    rows = side_by_side([reading])
    variance = np.zeros_like(rows.mean) if rows.variance is None else rows.variance
    return rows.mean.astype(np.float64), variance.astype(np.float64), plan.count(turn)


def activations(shape: tuple[int, ...], offset: float, dtype: torch.dtype, seed: int, layout: str) -> torch.Tensor:
    """Draw an activation whose mean is ``offset`` times its deviation, laid out in one of several ways."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset).to(dtype)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    if layout == "turned":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


@settings(max_examples=200)
@given(
    SHAPES,
    st.sampled_from([0.0, 3.0, -1e4, 1e4]),
    st.sampled_from(list(EPSILON)),
    st.sampled_from(["plain", "channels_last", "sliced", "turned"]),
    st.booleans(),
    st.booleans(),
)
def test_reading_all_equals_float64_numpy(  # noqa: PLR0917 - hypothesis draws them
    shape: tuple[int, ...], offset: float, dtype: torch.dtype, layout: str, knows: bool, scratch: bool
) -> None:
    """Every rank, type and layout, batch 1, one position, and means 10,000 times the deviation.

    Whether the anchor is near the mean or not, and however far the input's own rounding has moved it.
    """
    if dtype is torch.float16 and abs(offset) > 100:
        offset /= 100  # in this type the values themselves would be a few steps apart
    x = activations(shape, offset, dtype, 0, layout)
    exact = x.double().flatten(2).numpy() if x.ndim > 2 else x.double().unsqueeze(-1).numpy()
    wide = torch.promote_types(dtype, torch.float32)
    anchor = torch.full((shape[1],), offset if knows else 0.0, dtype=wide)
    mean, variance, _ = observe(x, anchor, scratch=Scratch() if scratch else None)
    away = np.abs(exact - anchor[0].item()).max()
    np.testing.assert_allclose(mean, exact.mean(-1) - anchor[0].item(), atol=8 * EPSILON[dtype] * away)
    tolerance = 16 * EPSILON[dtype] * (1 + exact.var(-1).max()) + (16 * EPSILON[dtype] * away) ** 2
    np.testing.assert_allclose(variance, exact.var(-1), rtol=1e-5, atol=tolerance)


@given(
    st.lists(st.integers(1, 12), min_size=0, max_size=3),
    st.sampled_from([1, 2, 3, 7, 20]),
    st.integers(1, 3),
    st.sampled_from([1, 64, 512, None]),
    st.booleans(),
)
def test_every_position_of_each_sample_is_read_equally_often(
    sizes: list[int], samples: int, channels: int, values: int | None, last: bool
) -> None:
    """Over as many forwards as there are positions, cells weigh each position the same: means are unbiased.

    In each forward, the cells of all samples together take what belongs to each sample, and nothing twice.
    """
    shape = (samples, channels, *sizes)
    memory = torch.empty(shape)
    if last and len(sizes) == 2:
        memory = memory.contiguous(memory_format=torch.channels_last)
    numbered = np.empty(math.prod(shape), np.int64)
    plan = Plan(shape, memory.stride(), values)
    positions = math.prod(sizes)
    np.lib.stride_tricks.as_strided(numbered, shape, [step * 8 for step in memory.stride()])[:] = np.arange(
        numbered.size
    ).reshape(shape)
    weight = np.zeros(numbered.size)
    for turn in range(positions):
        taken = 0
        for cell in plan.cells(turn):
            assert cell.samples.start == taken
            taken = cell.samples.stop
            view = np.lib.stride_tricks.as_strided(
                numbered[cell.offset :], cell.size, [step * 8 for step in cell.stride]
            )
            seen = np.bincount(view.ravel(), minlength=numbered.size)
            assert seen.max() == 1
            rows = view.reshape(taken - cell.samples.start, -1) // (channels * positions)
            assert np.array_equal(rows.T, np.broadcast_to(np.arange(cell.samples.start, taken), rows.T.shape))
            weight += seen / cell.count
        assert taken == samples
    np.testing.assert_allclose(weight, 1, atol=1e-9)


def test_samples_of_one_forward_are_read_in_cells_all_over_the_activation() -> None:
    """What eight equal samples show differs as what eight forwards of one show: they have no cell in common."""
    ramp = torch.linspace(0, 1, 112).expand(8, 64, 112, 112).contiguous()
    (_, _, *sizes), stride = ramp.shape, ramp.stride()
    one = ramp[:1]
    apart = [observe(one, torch.zeros(64), 8192, turn)[0][0, 0] for turn in range(200)]
    together = np.array([observe(ramp, torch.zeros(64), 8192, turn)[0][:, 0] for turn in range(25)])
    assert len(Plan(ramp.shape, stride, 8192).parts) == len(sizes)
    assert np.std(apart) > 0.2
    assert together.std(1).mean() == pytest.approx(np.std(apart), rel=0.15)
    assert together.mean(1).std() < 0.1 * np.std(apart)


@pytest.mark.parametrize("samples", [1, 2, 5, 8, 33, 100])
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("sizes", [(28, 28), (17, 17), (8, 8), (3, 6, 8), (999,)])
def test_what_is_read_is_what_the_cells_show(sizes: tuple[int, ...], layout: str, samples: int) -> None:
    """Means and variances of each sample are those of the positions that its cell takes."""
    x = activations((samples, 20, *sizes), 2.0, torch.float32, 0, layout)
    plan = Plan(x.shape, x.stride(), 1024)
    flat = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0).double().numpy()
    for turn in range(3):
        views = [
            np.lib.stride_tricks.as_strided(flat[cell.offset :], cell.size, [step * 8 for step in cell.stride])
            for cell in plan.cells(turn)
        ]
        exact = np.concatenate([view.reshape(-1, 20, plan.count(turn)) for view in views])
        mean, variance, count = observe(x, torch.full((20,), 2.0), 1024, turn)
        assert count == plan.count(turn)
        np.testing.assert_allclose(mean + 2.0, exact.mean(-1), atol=1e-5)
        np.testing.assert_allclose(variance, exact.var(-1), rtol=1e-4, atol=1e-6)


def test_every_sample_and_channel_is_read_each_time_and_about_as_much_as_asked_for() -> None:
    """Shapes of real layers: what is read stays near the number of values, or at the fewest positions."""
    for channels, height, width in (
        (32, 112, 112),
        (96, 56, 56),
        (512, 28, 28),
        (960, 7, 7),
        (64, 149, 149),
        (8, 1, 999),
    ):
        shape = (3, channels, height, width)
        plan = Plan(shape, torch.empty(shape, device="meta").stride(), 8192)
        least = height * width if height * width <= FEW_POSITIONS else MIN_POSITIONS
        target = min(height * width, max(least, 8192 // channels))
        turns = range(min(plan.positions, 2000))
        assert all(sum(cell.samples.stop - cell.samples.start for cell in plan.cells(turn)) == 3 for turn in turns)
        counts = [plan.count(turn) for turn in turns]
        assert 0.5 * target <= np.mean(counts) <= 2 * target


def test_rows_laid_out_of_one_sample_are_its_positions() -> None:
    """Five frames of six samples: what is read of each sample is spread over its frames."""
    frames = torch.randn(6 * 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, variance, count = observe(frames, torch.zeros(3), samples=6)
    exact = frames.double().reshape(6, 5, 3, 16).transpose(1, 2).flatten(2).numpy()
    assert count == 80
    np.testing.assert_allclose(mean, exact.mean(-1), atol=1e-6)
    np.testing.assert_allclose(variance, exact.var(-1), rtol=1e-5)


def test_mean_and_total_variance_are_not_biased_by_reading_less() -> None:
    """Over all forwards of a turn, means and mean squares average to those of all positions, however alike they are."""
    octaves = [
        torch.nn.functional.interpolate(torch.randn(5, 8, size, size), 14, mode="bilinear") for size in (2, 3, 7, 14)
    ]
    x = torch.stack(octaves).sum(0).double()
    exact = x.flatten(2).numpy()
    found = [observe(x, torch.zeros(8, dtype=torch.float64), 256, turn) for turn in range(196)]
    counts = {count for _, _, count in found}
    assert max(counts) < 50
    np.testing.assert_allclose(np.mean([mean for mean, _, _ in found], axis=0), exact.mean(-1), atol=1e-12)
    squares = np.mean([variance + mean**2 for mean, variance, _ in found], axis=0)
    np.testing.assert_allclose(squares, np.square(exact).mean(-1), rtol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reading_on_a_gpu_equals_reading_on_the_cpu() -> None:
    """The GPU's own formula gives the same, in half precision too."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = activations((4, 64, 28, 28), 3.0, dtype, 0, "channels_last")
        for turn in range(3):
            here = observe(x, torch.full((64,), 3.0), 4096, turn)
            there = observe(x.cuda(), torch.full((64,), 3.0, device="cuda"), 4096, turn)
            np.testing.assert_allclose(there[0], here[0], atol=1e-5)
            np.testing.assert_allclose(there[1], here[1], rtol=1e-4)
