"""The facts of the field, each with a test that fails without the guard's answer to it."""

from __future__ import annotations

import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from guardserve import EvalGuard, GuardWarning, TrainingModeError, buffers
from guardserve.buffers import BufferWatch
from guardserve.graphs import graph_norms
from guardserve.walks import bit_sum

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convnet() -> nn.Sequential:
    """Return a small trained convolutional model, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyBatchNorm1d())
    for _ in range(10):
        model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model


def expected(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """Return what a copy of the model gives in eval mode."""
    with torch.no_grad():
        y: torch.Tensor = copy.deepcopy(model).eval()(x)
    return y


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    """Trace a model as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript, and that the trace is not repeatable
        module: torch.jit.ScriptModule = torch.jit.trace(model, X, check_trace=False)  # type: ignore[no-untyped-call]
    return module


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """Script a model as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: torch.jit.ScriptModule = torch.jit.script(model)
    return module


def exported(model: nn.Module) -> nn.Module:
    """Export a model as it is."""
    return torch.export.export(model, (X,)).module()


@contextmanager
def one_process_group() -> Iterator[None]:
    """Initialise distributed training with this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def contents_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the buffers at each call, and at their contents, rather than once in a while."""
    monkeypatch.setattr(buffers, "LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(buffers, "CONTENT_INTERVAL", 0.0)


def test_no_grad_alone_lets_one_nan_row_ruin_the_model_and_the_guard_does_not() -> None:
    """A training forward under no_grad moves the running statistics for ever; a guarded one moves nothing."""
    bad = X.clone()
    bad[0] = float("nan")
    unguarded, model = convnet(), convnet()
    with torch.no_grad():
        unguarded(bad)
    assert expected(unguarded).isnan().all(), "the hazard is real"
    EvalGuard(model, on_nonfinite="ignore")(bad)
    assert expected(model).isfinite().all()


@pytest.mark.parametrize("build", [traced, exported], ids=["traced", "exported"])
def test_a_graph_made_in_training_mode_is_refused_by_layer_with_the_remedy(
    build: Callable[[nn.Module], nn.Module],
) -> None:
    """eval() cannot reach it, so construction fails and names each layer; made in eval mode it is taken."""
    model = convnet()
    bad = build(model)
    assert [(norm.name, norm.trains) for norm in graph_norms(bad)] == [("1", True), ("4", True)]
    with pytest.raises(TrainingModeError, match=r"1 \(aten.*batch_norm\) was traced or exported in training mode"):
        EvalGuard(bad)
    with pytest.warns(GuardWarning, match=r"model\.eval\(\) before tracing"):
        guard = EvalGuard(bad, on_hazard="warn")
    assert guard.counts["hazards"] == 2
    good = build(model.eval())
    torch.testing.assert_close(EvalGuard(good)(X), expected(model))


def test_a_script_made_in_training_mode_is_put_in_eval_mode_and_given_back() -> None:
    """Scripted flags live in C++ and still are held and restored, module by module."""
    model = convnet()
    script = scripted(model)
    guard = EvalGuard(script)
    torch.testing.assert_close(guard(X[:1]), expected(model, X[:1]))
    assert [module.training for module in script.modules()] == [True] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(io.BytesIO(script.save_to_buffer()))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(EvalGuard(loaded)(X[:1]), expected(model, X[:1]))


def test_a_traced_model_that_moves_its_buffers_is_caught_in_the_act() -> None:
    """An expert who goes on with a training-mode trace is told which statistics moved."""
    with pytest.warns(GuardWarning):
        guard = EvalGuard(traced(convnet()), on_hazard="warn")
    with pytest.warns(GuardWarning, match=r"inference changed buffers: .*running_mean"):
        guard(X)
    assert guard.counts["buffers_changed"] == 6


def test_exported_programs_work_although_their_eval_raises() -> None:
    """eval() and train() raise on such a module; the guard writes no flag through them."""
    program = exported(convnet().eval())
    with pytest.raises(NotImplementedError):
        program.eval()
    guard = EvalGuard(program)
    with guard as m:
        torch.testing.assert_close(m(X), guard(X))


def test_layers_without_running_statistics_are_refused() -> None:
    """track_running_stats=False makes answers depend on batch mates in eval mode too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(x)[:2], model(x[:2]), atol=1e-3), "the hazard is real"
    with pytest.raises(TrainingModeError, match=r"1 \(BatchNorm1d\) has no running statistics.*GroupNorm"):
        EvalGuard(model)
    with pytest.warns(GuardWarning, match="batch mates"):
        assert EvalGuard(model, on_hazard="warn").counts["hazards"] == 1


class Functional(nn.Module):
    """Calls the functional form in training mode on the statistics of a layer, or on buffers of its own."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.own = own
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in training mode, whatever the flag says."""
        mean, var = (self.mean, self.var) if self.own else (self.bn.running_mean, self.bn.running_var)
        return nn.functional.batch_norm(x, mean, var, training=True)  # type: ignore[arg-type]


def test_a_forward_that_moves_running_statistics_is_an_error_that_names_them() -> None:
    """No flag is wrong, and yet the answer changes what later answers will be: only the buffers show it."""
    guard = EvalGuard(Functional(own=False))
    with pytest.raises(TrainingModeError, match=r"moved running statistics: bn\.running_mean, bn\.running_var"):
        guard(torch.randn(4, 3))
    assert (guard.counts["buffers_changed"], guard.counts["hazards"]) == (2, 1)
    with pytest.raises(TrainingModeError), guard:
        guard.module(torch.randn(4, 3))
    assert torch.is_grad_enabled()


def test_silent_writes_are_found_at_the_next_look_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents are compared once in a while; what batch normalisation wrote in between is undone."""
    monkeypatch.setattr(buffers, "CONTENT_INTERVAL", 0.2)
    model = Functional(own=False)
    guard = EvalGuard(model)
    with pytest.raises(TrainingModeError, match="put back"):
        guard(torch.randn(4, 3) + 5)
    guard(torch.randn(4, 3) + 5)  # behind the counter's back, and not yet due
    assert not torch.equal(model.get_buffer("bn.running_mean"), torch.zeros(3))
    time.sleep(0.25)
    with pytest.raises(TrainingModeError, match=r"bn\.running_mean"):
        guard(torch.randn(4, 3) + 5)
    assert torch.equal(model.get_buffer("bn.running_mean"), torch.zeros(3))
    assert torch.equal(model.get_buffer("bn.running_var"), torch.ones(3))


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [4.0, 2.0, 0.5]])
def test_what_an_owner_wrote_since_is_what_is_put_back(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where values only changed places, which their sum does not show."""
    monkeypatch.setattr(buffers, "LOOK_INTERVAL", 0.0)
    monkeypatch.setattr(buffers, "CONTENT_INTERVAL", 0.0)
    model = nn.BatchNorm1d(3).eval()
    mean = model.get_buffer("running_mean")
    mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    watch = BufferWatch(model)
    assert watch.changed() == []
    mean.copy_(torch.tensor(values))
    watch.mark()
    assert watch.changed() == []
    watch.mark()
    nn.functional.batch_norm(torch.randn(4, 3), mean, model.running_var, training=True)
    assert watch.changed() == ["running_mean", "running_var"]
    assert mean.tolist() == values


def test_a_buffer_that_a_forward_registers_is_watched_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a module that had none."""
    monkeypatch.setattr(buffers, "LOOK_INTERVAL", 0.0)
    model = nn.Sequential(nn.ReLU())
    watch = BufferWatch(model)
    model[0].register_buffer("made", torch.zeros(2))
    assert watch.changed() == ["0.made"]
    watch.mark()
    model[0].get_buffer("made").add_(1)
    assert watch.changed() == ["0.made"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_sums_of_contents_show_each_value(dtype: torch.dtype) -> None:
    """The first, one in the midst and the last, of few values and of many."""
    for size in (1, 7, 70_001):
        buffer = -torch.ones(size, dtype=dtype)
        before = _bit_sums(buffer)
        for index in {0, size // 2, size - 1}:
            buffer[index] = 3
            assert _bit_sums(buffer) != before
            buffer[index] = -1
        assert _bit_sums(buffer) == before


def _bit_sums(buffer: torch.Tensor) -> tuple[int | None, int | None]:
    sums = bit_sum(buffer), buffers._bit_sum(buffer)
    assert sums[0] in (None, sums[1])
    return sums


@pytest.mark.parametrize(
    "tensor", [torch.ones(4)[::2], torch.ones(2, 2).T, torch.ones(2, dtype=torch.bool), torch.ones(1, device="meta"), 1]
)
def test_what_is_not_side_by_side_is_left_to_torch(tensor: object) -> None:
    """The part in C reads usual values on the CPU alone."""
    assert bit_sum(tensor) is None


class Counting(nn.Module):
    """Counts its calls in a buffer, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.counts = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        if self.counts:
            self.get_buffer("calls").add_(1)
        return x


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have buffers looked at every 0.2 s by a clock that the test moves."""
    clock = Clock()
    monkeypatch.setattr(buffers, "time", clock)
    monkeypatch.setattr(buffers, "LOOK_INTERVAL", 0.2)
    return clock


def test_between_two_looks_changes_wait_for_the_next(clock: Clock) -> None:
    """A forward that goes on changing a buffer is found soon, and one that did while the model was held too."""
    model = Counting()
    guard = EvalGuard(model)
    guard(X)
    model.counts = True
    guard(X)
    clock.now += 0.25
    model.get_buffer("calls").zero_()  # by no call
    for _ in range(2):  # from here on each is looked at
        with pytest.warns(GuardWarning, match="changed buffers: calls"):
            guard(X)
    model.counts = False
    guard(X)
    with guard:
        for _ in range(2):
            clock.now += 0.25
            guard(X)  # takes what there is for unchanged, and looks
        model.counts = True
        guard(X)
        model.counts = False
        clock.now += 0.25
        with pytest.warns(GuardWarning, match="changed buffers: calls"):
            guard(X)
    assert guard.counts["buffers_changed"] == 3


def test_calls_that_overlap_hide_no_change_for_good(clock: Clock) -> None:
    """Also where the first of two always ends, and has to take what there is for unchanged, before the other does."""
    model = Counting()
    guard = EvalGuard(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)
        for _ in range(100):
            guard.acquire()
            guard.acquire()
            model.get_buffer("calls").add_(1)
            clock.now += 0.12
            guard.release()
            guard.release()
            clock.now += 0.1
    assert guard.counts["buffers_changed"] > 30


def test_statistics_that_are_moved_at_each_call_are_put_back_each_time(clock: Clock) -> None:
    """Calls between two looks do not go unseen once one has moved them, though it has told the counter too."""

    class Moving(Functional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn.get_buffer("num_batches_tracked").add_(1)
            return super().forward(x)

    model = Moving(own=False)
    guard = EvalGuard(model)
    for _ in range(10):
        clock.now += 0.05
        with pytest.raises(TrainingModeError):
            guard(torch.randn(4, 3) + 5)
    torch.testing.assert_close(model.get_buffer("bn.running_mean"), torch.zeros(3))


def test_odd_buffers_and_lazy_layers_are_guarded() -> None:
    """Buffers that have no plain memory are looked at as far as they go, and becoming real is no change."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    model.register_buffer("conjugate", torch.zeros(3, dtype=torch.complex64).conj())
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    guard = EvalGuard(model)
    assert guard(X).shape == (4, 4, 6, 6)
    guard(X)
    assert guard.counts["buffers_changed"] == 0
    assert all(module.training for module in model.modules())


def test_a_frozen_script_is_guarded() -> None:
    """It has no flag at all, for it is in eval mode for good."""
    model = convnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.jit.freeze(scripted(model.eval()))
    torch.testing.assert_close(EvalGuard(frozen)(X[:1]), expected(model, X[:1]))


def test_other_buffers_that_change_are_reported_by_name() -> None:
    """They may be a cache that is meant to change, so the call goes through with a warning."""
    guard = EvalGuard(Functional(own=True))
    with pytest.warns(GuardWarning, match="inference changed buffers: mean, var"):
        guard(torch.randn(4, 3))
    assert guard.counts["buffers_changed"] == 2


def test_loading_weights_between_calls_is_no_change_by_inference() -> None:
    """Only what happens inside a call or a block counts."""
    model = convnet()
    guard = EvalGuard(model)
    guard(X)
    model.load_state_dict(convnet().state_dict())
    model.train()
    model(X)
    guard(X)
    assert guard.counts["buffers_changed"] == 0


@pytest.mark.parametrize("seconds", [0.3, 1.5])
@pytest.mark.parametrize("through", ["data", "numpy"])
def test_statistics_that_are_written_between_calls_stay(seconds: float, through: str, clock: Clock) -> None:
    """However they are written, and however long ago the last call was."""
    model = convnet().eval()
    statistics = model.get_buffer("1.running_mean")
    guard = EvalGuard(model)
    guard(X)
    clock.now += seconds
    if through == "data":
        statistics.data.fill_(3.0)
    else:
        statistics.numpy().fill(3.0)
    want = expected(model)
    for _ in range(2):
        torch.testing.assert_close(guard(X), want)
        clock.now += seconds
    assert guard.counts["buffers_changed"] == 0


def test_models_loaded_in_inference_mode_can_be_guarded() -> None:
    """Their buffers keep no version counter, which must not stop anything."""
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm2d(3))
    assert EvalGuard(model, inference_mode=True)(X).shape == X.shape


def test_a_compiled_model_is_guarded() -> None:
    """The compiled module's own flags are held; it answers as in eval mode and is given back training."""
    model = convnet()
    want = expected(model)
    compiled = torch.compile(model, backend="eager")
    guard = EvalGuard(compiled)  # type: ignore[arg-type]
    torch.testing.assert_close(guard(X), want)
    torch.testing.assert_close(guard(X[:1]), want[:1])
    assert all(module.training for module in model.modules())
    assert guard.counts["buffers_changed"] == 0


def test_a_data_parallel_wrapper_is_guarded() -> None:
    """DistributedDataParallel's wrapper and what it wraps are held alike."""
    with one_process_group():
        model = convnet()
        want = expected(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(EvalGuard(wrapped)(X), want)
        assert all(module.training for module in wrapped.modules())


def test_a_fully_sharded_model_is_guarded() -> None:
    """fully_shard changes the classes of modules in place; the guard holds them all the same."""
    with one_process_group():
        model = convnet()
        want = expected(model)
        sharded = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(EvalGuard(sharded)(X), want)  # type: ignore[arg-type]
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_and_autocast_are_guarded(dtype: torch.dtype) -> None:
    """The guard changes modes, not types."""
    model = convnet()
    want = expected(model)
    with torch.autocast("cpu", dtype=dtype):
        y = EvalGuard(model)(X)
    torch.testing.assert_close(y.float(), want, atol=0.1, rtol=0.1)
    half = copy.deepcopy(model).to(dtype)
    y = EvalGuard(half)(X.to(dtype))
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), want, atol=0.1, rtol=0.1)


def test_a_model_without_batchnorm_is_guarded_too() -> None:
    """Dropout is reason enough."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    guard = EvalGuard(model)
    x = torch.ones(1, 3)
    assert torch.equal(guard(x), guard(x))
    assert model.training


def test_batched_and_single_answers_agree_within_tolerance() -> None:
    """A correct model's rows differ by rounding between batch sizes, not more."""
    guard = EvalGuard(convnet())
    together = guard(X)
    torch.testing.assert_close(torch.cat([guard(row[None]) for row in X]), together, rtol=1e-4, atol=1e-5)


def test_a_guarded_model_can_be_scripted_and_is_still_guarded() -> None:
    """TorchScript does not see the guard's hooks, and the model's own forward still runs them."""
    model = convnet().eval()
    guard, again = EvalGuard(model), EvalGuard(model)
    expected = guard(X)
    script = scripted(model)
    assert torch.equal(script(X), expected)
    assert torch.equal(EvalGuard(script)(X), expected)
    frozen = io.BytesIO(script.save_to_buffer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.load(frozen)(X), expected)  # type: ignore[no-untyped-call]
    with guard:
        model[1].train()
        assert torch.equal(model(X), expected)
    assert guard.counts["training_during_forward"] == 1
    again.close()
    guard.close()
    assert not any(layer._forward_pre_hooks for layer in model)


def test_hooks_that_a_user_has_put_on_a_layer_stay_in_place() -> None:
    """Before the guard and after it, with handles that remove them."""
    layer, calls = nn.BatchNorm1d(3).eval(), list[str]()
    before = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    guard = EvalGuard(layer)
    after = layer.register_forward_pre_hook(lambda *_: calls.append("after"))
    guard(torch.ones(2, 3))
    assert calls == ["before", "after"]
    other, seen = nn.BatchNorm1d(3).eval(), list[str]()
    guard = EvalGuard(other)
    handle = other.register_forward_pre_hook(lambda *_: seen.append("other"))
    assert len(list(other._forward_pre_hooks.values())) == 1
    guard(torch.ones(2, 3))
    for hook in (before, after, handle):
        hook.remove()
    layer(torch.ones(2, 3))
    other(torch.ones(2, 3))
    assert (calls, seen) == (["before", "after"], ["other"])
