"""EvalGuard: flags, gradients, threads, decorators and the non-finite policy."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import pickle
import random
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from guardserve import EvalGuard, MissingExtraError, NonFiniteOutputError, NonFiniteOutputWarning


class Net(nn.Module):
    """Two BatchNorm layers, one of which a fine-tuner has frozen, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, shape ``(N, 2)``."""
        y: torch.Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return y


@pytest.fixture
def net() -> Net:
    """Return a model in training mode with one frozen BatchNorm layer."""
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(16, 3, 8, 8))
    net.stem[1].eval()
    return net


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def flags(model: nn.Module) -> list[bool]:
    """Return every module's own training flag."""
    return [module.training for module in model.modules()]


def state(model: nn.Module) -> list[torch.Tensor]:
    """Return a copy of every parameter and buffer."""
    return [value.clone() for value in model.state_dict().values()]


def expected(model: nn.Module) -> torch.Tensor:
    """Return what a copy of the model gives in eval mode."""
    with torch.no_grad():
        output: torch.Tensor = copy.deepcopy(model).eval()(X)
    return output


def test_a_call_runs_in_eval_mode_without_gradients_and_moves_no_statistic(net: Net) -> None:
    """The output is the eval output, carries no graph, and no buffer has changed."""
    want, before = expected(net), state(net)
    y = EvalGuard(net)(X)
    assert torch.equal(y, want)
    assert not y.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True))


def test_every_module_gets_its_own_flag_back(net: Net) -> None:
    """A frozen BatchNorm layer stays frozen and the rest goes on training."""
    before = flags(net)
    assert True in before
    assert False in before
    EvalGuard(net)(X)
    assert flags(net) == before


def test_flags_and_gradients_come_back_when_the_forward_raises(net: Net) -> None:
    """An exception passes through unchanged and leaves nothing behind."""
    before = flags(net)
    with pytest.raises(RuntimeError, match="channels"):
        EvalGuard(net)(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ZeroDivisionError), EvalGuard(net):
        raise ZeroDivisionError
    assert flags(net) == before
    assert torch.is_grad_enabled()


def test_a_block_gives_the_model_in_eval_mode(net: Net) -> None:
    """Inside the block the model and its parts are in eval mode without gradients."""
    before, want = flags(net), expected(net)
    with EvalGuard(net) as m:
        assert m is net
        assert not any(flags(net))
        assert not m.stem(X).requires_grad
        assert torch.equal(m(X), want)
    assert flags(net) == before


def test_blocks_calls_and_guards_of_parts_nest(net: Net) -> None:
    """An inner exit never ends the outer protection, whichever guard it belongs to."""
    before = flags(net)
    outer, part = EvalGuard(net), EvalGuard(net.block)
    with part:
        with outer:
            with outer:
                outer(X)
                assert not any(flags(net))
            part(net.stem(X))
            assert not any(flags(net))
            assert not torch.is_grad_enabled()
        assert not any(flags(net.block))
        assert net.training
    assert flags(net) == before
    assert torch.is_grad_enabled()


def test_overlapping_holders_may_leave_in_any_order(net: Net) -> None:
    """The flags come back with the last holder, not with the first that entered or left."""
    before = flags(net)
    guards = [EvalGuard(net), EvalGuard(net), EvalGuard(net.block)]
    for seed in range(20):
        order = random.Random(seed).sample(guards, len(guards))
        for guard in guards:
            guard.acquire()
        for left, guard in enumerate(order, 1):
            guard.release()
            assert not any(flags(net.block)) or guards[2] in order[:left]
        assert flags(net) == before


def test_threads_that_overlap_never_see_training(net: Net) -> None:
    """Many threads enter and leave at random: outputs are eval outputs, flags and statistics survive."""
    before, want, statistics = flags(net), expected(net), state(net)
    guard, other = EvalGuard(net), EvalGuard(net)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            chosen = rng.choice([guard, other])
            if rng.random() < 0.5:
                y = chosen(X)
            else:
                with chosen as m:
                    y = m(X)
            if not torch.allclose(y, want, atol=1e-6) or y.requires_grad:
                wrong.append(y)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert flags(net) == before
    assert all(torch.equal(a, b) for a, b in zip(statistics, state(net), strict=True))
    assert guard.counts["calls"] + other.counts["calls"] > 0


class Stubborn(nn.Module):
    """Its train() ignores what it is told, and its forward puts a layer back in training."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def train(self, mode: bool = True) -> Stubborn:
        """Always train."""
        del mode
        return super().train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, in training mode unless somebody prevents it."""
        self.bn.train()
        y: torch.Tensor = self.bn(x)
        return y


def test_an_overridden_train_and_a_train_inside_forward_do_not_defeat_it() -> None:
    """Neither a train() that always trains nor a .train() during the forward reaches BatchNorm."""
    model = Stubborn()
    assert model.eval().bn.training, "eval() alone does not help"
    guard = EvalGuard(model)
    x = torch.randn(4, 3)
    torch.testing.assert_close(guard(x), x / (1 + 1e-5) ** 0.5)
    assert model.bn.num_batches_tracked is not None
    assert model.bn.num_batches_tracked.item() == 0
    assert guard.counts["training_during_forward"] == 1


def test_modules_added_after_construction_are_guarded(net: Net) -> None:
    """A layer that is inserted, appended or replaced later is put in eval mode too, and given back."""
    guard = EvalGuard(net)
    net.block.append(nn.BatchNorm2d(4))
    net.stem._modules["1"] = nn.BatchNorm2d(4)
    before = flags(net)
    with guard:
        assert not any(flags(net))
        net.block[1].train()
        net.block[-1].train()
        net(X)
    assert flags(net) == before
    assert guard.counts["training_during_forward"] == 2


def test_a_custom_layer_that_heeds_the_flag_is_not_reached_by_a_train_inside_forward() -> None:
    """Not only torch's own layers: a leaf of a foreign class, such as stochastic depth, is protected as well."""

    class Depth(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(1) if self.training else x

    class Flipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depth = Depth()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.train()
            y: torch.Tensor = self.depth(x)
            return y

    assert torch.equal(EvalGuard(Flipping())(X), X)


def test_a_layer_made_inside_forward_is_noticed_and_given_back_training() -> None:
    """It has run once as it was made; from then on it is held like any other."""

    class Growing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "bn"):
                self.bn = nn.BatchNorm2d(3)
            y: torch.Tensor = self.bn(x)
            return y

    model = Growing()
    guard = EvalGuard(model)
    guard(X)
    assert guard.counts["training_during_forward"] == 1
    assert model.bn.training, "it was made in training mode"
    assert torch.equal(guard(X), expected(model))


def test_a_train_between_two_overlapping_holds_is_nobodys_own_flag(net: Net) -> None:
    """What somebody flips while the model is held is not taken for its state by the next to enter."""
    net.eval()
    first, second = EvalGuard(net), EvalGuard(net)
    first.acquire()
    net.train()
    second.acquire()
    second.release()
    assert not any(flags(net)), "the first is still inside"
    first.release()
    assert not any(flags(net)), "it was in eval mode before both"


def test_gradients_that_were_turned_on_inside_a_block_stay_on_after_a_nested_one(net: Net) -> None:
    """A nested block gives back what it found, like torch's own context managers."""
    guard = EvalGuard(net)
    with guard, torch.enable_grad():
        with guard:
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_failed_entry_holds_nothing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the guard itself cannot enter, the flags are as they were."""
    guard = EvalGuard(net)
    before = flags(net)
    monkeypatch.setattr(guard._watch, "mark", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard(X)
    assert flags(net) == before


def test_the_models_own_error_is_the_one_to_be_seen() -> None:
    """A forward that moves statistics and then raises shows its own error; the move is counted."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn.get_buffer("running_mean").add_(x.mean())
            raise ZeroDivisionError

    guard = EvalGuard(Both())
    with pytest.raises(ZeroDivisionError):
        guard(torch.ones(4, 3))
    assert guard.counts["buffers_changed"] == 1


def test_a_guard_that_is_closed_while_it_holds_lets_go_once(net: Net) -> None:
    """Whoever is inside leaves as always, and later guards hold the model as always."""
    net.train()
    before = flags(net)
    with EvalGuard(net) as held:
        assert not held.training
        guard = EvalGuard(net)
        with guard:
            guard.close()
    assert flags(net) == before
    for again in (guard, EvalGuard(net)):
        with again:
            assert not net.training
        assert flags(net) == before


def test_a_guard_that_is_garbage_while_it_holds_lets_go(net: Net) -> None:
    """Nobody could release it any more."""
    before = flags(net)
    guard = EvalGuard(net)
    guard.acquire()
    del guard
    gc.collect()
    assert flags(net) == before


def test_lazy_results_of_a_decorated_function_are_driven_guarded(net: Net) -> None:
    """A generator expression, a map or a coroutine does its work later, and is guarded then."""
    guard = EvalGuard(net)
    want = expected(net)

    @guard
    def mapped() -> Any:
        return map(net, [X, X])

    @guard
    def generated() -> Any:
        return (net(X) for _ in range(2))

    async def inner() -> torch.Tensor:
        y: torch.Tensor = net(X)
        return y

    @guard
    def awaited() -> Any:
        return inner()

    assert all(torch.equal(y, want) for y in [*mapped(), *generated()])

    async def main() -> None:
        assert torch.equal(await awaited(), want)

    asyncio.run(main())


def test_partial_functions_are_decorated_too(net: Net) -> None:
    """functools.partial is a function, not an input of the model."""
    guard = EvalGuard(net)
    assert torch.equal(guard(functools.partial(net, X))(), expected(net))


def test_what_is_sent_to_and_thrown_into_an_async_generator_reaches_it(net: Net) -> None:
    """The decorated one behaves as the plain one."""
    guard = EvalGuard(net)
    received: list[str] = []

    @guard
    async def stream() -> AsyncIterator[torch.Tensor]:
        try:
            while True:
                received.append(str((yield net(X))))
        except KeyError as error:
            received.append(str(error))
            yield net(X)

    async def main() -> None:
        items: Any = stream()
        await items.__anext__()
        await items.asend("hello")
        await items.athrow(KeyError("thrown"))
        await items.aclose()

    asyncio.run(main())
    assert received == ["hello", "'thrown'"]


def test_a_nan_in_one_thread_leaves_the_others_alone() -> None:
    """Looking for an origin re-runs the model in its own thread and no other forward notices."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    bad, good = EvalGuard(model, on_nonfinite="warn"), EvalGuard(model)
    x = torch.ones(2, 3)
    nan = torch.full((2, 3), float("nan"))
    failures: list[BaseException] = []
    done = threading.Event()

    def serve() -> None:
        try:
            while not done.is_set():
                good(x)
        except BaseException as error:  # noqa: BLE001 - any failure is what the test looks for
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        with pytest.warns(NonFiniteOutputWarning):
            bad(nan)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_errors_survive_a_process_pool(net: Net) -> None:
    """They can be pickled with what they carry."""
    poison(net)
    with pytest.raises(NonFiniteOutputError) as caught:
        EvalGuard(net)(X)
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert (str(error), error.module, error.rows) == (str(caught.value), "block.1", (0,))
    missing = pickle.loads(pickle.dumps(MissingExtraError("Plots", "plot")))  # noqa: S301
    assert missing.extra == "plot"


def test_a_decorated_method_function_and_static_call_are_guarded(net: Net) -> None:
    """The guard decorates methods and functions, and hands arguments and results through."""
    guard = EvalGuard(net)

    class Server:
        @guard
        def predict(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            """Predict."""
            assert not any(flags(net))
            y: torch.Tensor = net(x)
            return y * scale

    before = flags(net)
    torch.testing.assert_close(Server().predict(X, scale=2.0), expected(net) * 2)
    assert Server.predict.__doc__ == "Predict."
    assert flags(net) == before


def test_a_decorated_generator_is_guarded_only_while_it_runs(net: Net) -> None:
    """Between two items the caller has its own modes; values sent and errors thrown reach the generator."""
    guard = EvalGuard(net)
    received: list[object] = []

    @guard
    def stream() -> Iterator[torch.Tensor]:
        try:
            while len(received) < 3:
                assert not any(flags(net))
                received.append((yield net(X)))
        except KeyError as error:
            received.append(error)
            yield net(X)

    before = flags(net)
    items = stream()
    assert torch.equal(next(items), expected(net))
    assert flags(net) == before
    assert torch.is_grad_enabled()
    items.send("hello")  # type: ignore[attr-defined]
    items.throw(KeyError("thrown"))  # type: ignore[attr-defined]
    assert [str(item) for item in received] == ["hello", "'thrown'"]
    items.close()  # type: ignore[attr-defined]
    assert flags(net) == before


def test_decorated_coroutines_interleave_without_leaking_modes(net: Net) -> None:
    """Coroutines of one loop are guarded while they run; while all of them wait, nothing is held."""
    guard = EvalGuard(net)
    before, want = flags(net), expected(net)

    @guard
    async def predict(delay: float) -> torch.Tensor:
        assert not any(flags(net))
        await asyncio.sleep(delay)
        assert not any(flags(net))
        assert not torch.is_grad_enabled()
        y: torch.Tensor = net(X)
        return y

    @guard
    async def stream() -> AsyncIterator[torch.Tensor]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield net(X)

    async def main() -> None:
        tasks = [asyncio.create_task(predict(0.01 * (5 - i))) for i in range(5)]
        await asyncio.sleep(0.005)
        assert flags(net) == before
        assert torch.is_grad_enabled()
        assert all(torch.equal(y, want) for y in await asyncio.gather(*tasks))
        async for y in stream():
            assert torch.equal(y, want)
            assert flags(net) == before

    asyncio.run(main())
    assert flags(net) == before


def test_blocks_of_interleaved_coroutines_keep_gradients_off_until_the_last_ends(net: Net) -> None:
    """Blocks that end in another order than they began neither re-enable gradients early nor leave them off."""
    guard = EvalGuard(net)

    async def block(enter: float, leave: float) -> None:
        await asyncio.sleep(enter)
        with guard as m:
            await asyncio.sleep(leave)
            assert not torch.is_grad_enabled()
            assert not any(flags(net))
            m(X)

    async def main() -> None:
        await asyncio.gather(block(0, 0.01), block(0.005, 0.02), block(0.002, 0.03))

    before = flags(net)
    asyncio.run(main())
    assert torch.is_grad_enabled()
    assert flags(net) == before


def test_leaving_a_block_in_another_thread_is_an_error_that_says_so(net: Net) -> None:
    """Gradient mode belongs to a thread, so the mistake is named; the flags come back all the same."""
    guard = EvalGuard(net)
    before = flags(net)
    thread = threading.Thread(target=guard.__enter__)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="entered in another thread"):
        guard.__exit__(None, None, None)
    assert flags(net) == before


def test_copies_and_pickles_of_a_guarded_model_are_ordinary_models(net: Net) -> None:
    """The guard's hooks hold nothing back in a copy, and a guard can be copied with its model."""
    guard = EvalGuard(net)
    with guard:
        copied = copy.deepcopy(net)
        loaded = pickle.loads(pickle.dumps(net))  # noqa: S301 - our own bytes
    for other in (copied, loaded):
        other.train()
        other(torch.randn(4, 3, 8, 8))
        assert all(flags(other)), "an active guard of the original must not reach the copy"
    twin = copy.deepcopy(guard)
    assert twin.module is not net
    torch.testing.assert_close(twin(X), guard(X))


def test_the_garbage_collector_may_find_a_guard_anywhere() -> None:
    """Also in a thread that is entering another one, for which the first must not wait: it would do so for ever."""
    other = nn.Sequential(nn.BatchNorm1d(3))
    surveys = 0

    class Collecting(nn.Module):
        def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
            nonlocal surveys
            surveys += 1
            gc.collect()
            return super().modules(remove_duplicate)

    outer = Collecting()
    guard = EvalGuard(outer)
    for _ in range(3):
        dropped = EvalGuard(other)
        dropped.acquire()
        dropped.cycle = dropped  # type: ignore[attr-defined]  # only the collector finds it
        del dropped
        outer.child = nn.Linear(3, 3)  # the tree is listed anew, in acquire
        before, training = surveys, other.training
        with guard:
            assert surveys > before
            assert (training, other.training) == (False, True)
        del outer.child


def test_close_and_garbage_remove_every_hook(net: Net) -> None:
    """Nothing stays on the model."""

    def hooks() -> int:
        looked_at = sum("_check_input_dim" in vars(m) for m in net.modules())
        return looked_at + sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())

    guard = EvalGuard(net)
    assert hooks() == 3
    guard.close()
    assert hooks() == 0
    guard = EvalGuard(net)
    del guard
    assert hooks() == 0


def test_a_model_found_training_is_reported_once_and_counted_each_time(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names modules and the remedy."""
    guard = EvalGuard(net)
    guard(X)
    guard(X)
    assert guard.counts["training_on_entry"] == 2
    (record,) = caplog.records
    assert "Net was in training mode (the model itself, stem, stem.0 and 6 more)" in record.getMessage()
    assert ".eval()" in record.getMessage()


def poison(net: Net) -> None:
    """Put a NaN into a running variance, as one bad training batch would."""
    net.get_buffer("block.1.running_var")[2] = float("nan")


def test_a_non_finite_output_raises_with_output_count_and_module(net: Net) -> None:
    """The error names the output, how many values, and the module where it arose."""
    poison(net)
    guard = EvalGuard(net)
    with pytest.raises(
        NonFiniteOutputError, match=r"output holds 2 non-finite values of 2.*block\.1 \(BatchNorm2d\)"
    ) as e:
        guard(X)
    assert (e.value.output, e.value.count, e.value.total, e.value.module) == ("output", 2, 2, "block.1")
    assert guard.counts["nonfinite_outputs"] == 1
    assert guard.counts["nonfinite_values"] == 2


def test_the_other_policies_return_the_output_and_count_it(net: Net) -> None:
    """With "warn" there is a warning, with "ignore" silence; both count."""
    poison(net)
    warn, ignore = EvalGuard(net, on_nonfinite="warn"), EvalGuard(net, on_nonfinite="ignore")
    with pytest.warns(NonFiniteOutputWarning, match=r"block\.1"):
        assert warn(X).isnan().all()
    assert ignore(X).isnan().all()
    assert warn.counts["nonfinite_outputs"] == ignore.counts["nonfinite_outputs"] == 1


def test_decorated_functions_have_their_results_checked(net: Net) -> None:
    """A non-finite result of a decorated function is met like that of a call."""
    poison(net)
    guard = EvalGuard(net)

    @guard
    def predict() -> dict[str, torch.Tensor]:
        return {"logits": net(X)}

    with pytest.raises(NonFiniteOutputError, match=r"output\['logits'\] holds 2"):
        predict()


def test_inference_mode_is_offered_and_off_by_default(net: Net) -> None:
    """Outputs may be used in autograd unless the caller asked for inference mode."""
    assert not EvalGuard(net)(X).is_inference()
    assert EvalGuard(net, inference_mode=True)(X).is_inference()


def test_wrong_arguments_are_named_with_the_remedy(net: Net) -> None:
    """Not a module, or an unknown policy."""
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got function"):
        EvalGuard(flags)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_nonfinite='explode': use one of raise, warn, ignore"):
        EvalGuard(net, on_nonfinite="explode")  # type: ignore[arg-type]
