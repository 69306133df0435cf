"""Inlets: looking at what enters BatchNorm layers without forward hooks."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from guardserve import EvalGuard, Monitor, fuse
from guardserve.inlets import Inlet, has_inlet, on_input

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Own(nn.BatchNorm2d):
    """A layer with a forward of its own, which asks nothing."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - BatchNorm's own name for it
        """Scale the input."""
        return 2 * input


def net() -> nn.Sequential:
    """Return a small model in eval mode."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.mark.parametrize("build", [lambda: nn.BatchNorm2d(3), nn.LazyBatchNorm2d, lambda: Own(3)])
def test_a_look_is_had_at_each_input_by_position_or_by_name(build: Callable[[], nn.Module]) -> None:
    """Also where a layer has no inlet and takes a hook; afterwards nothing is left of it."""
    layer, seen = build().eval(), list[torch.Tensor]()
    handle = on_input(layer, seen.append)
    assert has_inlet(layer) is not isinstance(layer, Own)
    layer(X)
    layer(input=X)
    assert [x is X for x in seen] == [True, True]
    handle.remove()
    handle.remove()
    layer(X)
    assert len(seen) == 2
    assert not layer._forward_pre_hooks
    assert "_check_input_dim" not in vars(layer)


def test_several_look_in_order_and_leave_in_any() -> None:
    """One that goes leaves the others, and the layer's own check comes last."""
    layer, seen = nn.BatchNorm2d(3).eval(), list[str]()
    handles = [on_input(layer, lambda *_, name=name: seen.append(name)) for name in "abc"]
    layer(X)
    handles[1].remove()
    layer(X)
    assert seen == ["a", "b", "c", "a", "c"]
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.zeros(2, 3))
    assert seen[5:] == ["a", "c"]


def test_who_looks_alone_may_have_a_quicker_way() -> None:
    """It stands in for the look and for the layer's check where it says so, and steps aside while others look."""
    layer, seen, will_do = nn.BatchNorm2d(3).eval(), list[str](), [True]

    def look(_: torch.Tensor) -> None:
        seen.append("look")

    def glance(_: torch.Tensor) -> bool:
        seen.append("glance")
        return will_do[0]

    handle = on_input(layer, look, glance=glance)
    layer(X)
    will_do[0] = False
    layer(X)
    assert seen == ["glance", "glance", "look"]
    other = on_input(layer, lambda _: seen.append("other"))
    layer(X)
    assert seen[3:] == ["look", "other"]
    other.remove()
    layer(X)
    assert seen[5:] == ["glance", "look"]
    handle.remove()
    layer(X)
    assert len(seen) == 7
    assert "_check_input_dim" not in vars(layer)


class NoNegatives(nn.BatchNorm2d):
    """A layer with a check of its own."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - BatchNorm's own name for it
        if input.min() < 0:
            raise ValueError("negative")


class Forgiving(nn.Module):
    """Counts what its layer refuses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(3), layer)
        self.refused = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Go on without the layer."""
        self.layers[0](x.flatten(2))
        try:
            self.layers[1](x)
        except ValueError:
            self.refused += 1
        return x


@pytest.mark.parametrize(
    ("layer", "x"), [(NoNegatives(3), -torch.ones(2, 3, 4, 4)), (nn.BatchNorm2d(3), torch.ones(2, 3, 4))]
)
def test_a_monitored_layers_check_has_its_say_every_time(layer: nn.Module, x: torch.Tensor) -> None:
    """Also of inputs that are alike to those that the monitor knows where to read."""
    model = Forgiving(layer).eval()
    with Monitor(model), torch.inference_mode():
        for _ in range(5):
            model(x)
    assert model.refused == 5


def test_copies_pickles_scripts_and_fused_copies_are_not_looked_at() -> None:
    """They answer as the model does, and the model itself is looked at still."""
    model, seen = net(), list[torch.Tensor]()
    on_input(model[1], seen.append)
    expected = model(X)
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(model)
        file = io.BytesIO(script.save_to_buffer())  # type: ignore[no-untyped-call]
        others = [script, torch.jit.load(file)]  # type: ignore[no-untyped-call]
    others += [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fuse(model, X)]  # noqa: S301 - our own bytes
    seen.clear()
    for other in others:
        torch.testing.assert_close(other(X), expected)
    assert not seen
    copied = others[2][1]
    on_input(copied, seen.append)
    others[2](X)
    model(X)
    assert len(seen) == 2


class Static(nn.BatchNorm2d):
    """Checks without itself."""

    @staticmethod
    def _check_input_dim(input: torch.Tensor) -> None:  # noqa: A002 - as in torch
        del input


class OfClass(nn.BatchNorm2d):
    """Checks for its class."""

    @classmethod
    def _check_input_dim(cls, input: torch.Tensor) -> None:  # noqa: A002 - as in torch
        del input


def lenient(layer: nn.Module, x: torch.Tensor) -> None:
    """Check nothing, under a name of its own."""
    del layer, x


class Lenient(nn.BatchNorm2d):
    """Its check has another name."""

    _check_input_dim = lenient  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Static, OfClass, Lenient])
def test_checks_of_all_kinds_can_be_guarded_monitored_and_pickled(kind: type[nn.BatchNorm2d]) -> None:
    """A check need be no method, nor have the usual name."""
    model = nn.Sequential(kind(3)).train()
    with Monitor(model) as monitor:
        guard = EvalGuard(model)
        guard(X)
        copied = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
        assert monitor.snapshot().samples == len(X)
    guard.close()
    torch.testing.assert_close(copied.eval()(X), model.eval()(X))


def test_what_removes_the_last_look_in_the_midst_of_a_removal_is_no_error() -> None:
    """Nor does a check that was put aside bring a removed look back."""
    layer, seen = nn.BatchNorm2d(3).eval(), list[str]()
    handle = on_input(layer, lambda *_: seen.append("look"))
    aside = vars(layer)["_check_input_dim"]
    vars(layer)["_check_input_dim"] = lambda _: None
    handle.remove()
    vars(layer)["_check_input_dim"] = aside
    layer(X)
    assert not seen


def test_a_layer_that_keeps_a_check_or_a_forward_of_its_own_takes_a_hook() -> None:
    """What somebody else has put there stays."""
    layer, calls = nn.BatchNorm2d(3).eval(), list[str]()
    vars(layer)["_check_input_dim"] = lambda _: calls.append("check")
    handle = on_input(layer, lambda *_: calls.append("look"))
    layer(X)
    handle.remove()
    layer(X)
    assert calls == ["look", "check", "check"]


def replace_forward(layer: nn.Module) -> None:
    """Give a layer a forward of its own."""
    vars(layer)["forward"] = lambda x: x


def replace_check(layer: nn.Module) -> None:
    """Give it a check of its own."""
    vars(layer)["_check_input_dim"] = lambda _: None


def replace_class(layer: nn.Module) -> None:
    """Give it another class."""
    layer.__class__ = Own


@pytest.mark.parametrize("replace", [replace_forward, replace_check, replace_class])
def test_a_layer_that_somebody_else_takes_over_is_named_as_unobserved(replace: Callable[[nn.Module], None]) -> None:
    """It is not lost without a word; of a monitor that was closed nothing is said."""
    model = net()
    with Monitor(model) as monitor:
        model(X)
        assert not monitor.unobserved
        replace(model[1])
        model(X)
        assert "attach the monitor again" in monitor.unobserved["1"]
        assert monitor.snapshot().layers[0].samples == len(X)
    assert not monitor.unobserved


def test_a_forward_that_was_put_around_a_layers_own_leaves_it_observed() -> None:
    """As those of tracers and of offloading do: what it reads goes on."""
    model = net()
    with Monitor(model) as monitor:
        model(X)
        vars(model[1])["forward"] = functools.partial(model[1].forward)
        model(X)
        assert not monitor.unobserved
        assert monitor.snapshot().layers[0].samples == 2 * len(X)


def test_hooks_that_are_cleared_are_named_too() -> None:
    """Where a layer takes a hook."""
    model = nn.Sequential(Own(3)).eval()
    with Monitor(model) as monitor:
        model(X)
        assert not monitor.unobserved
        model[0]._forward_pre_hooks.clear()
        model(X)
        assert list(monitor.unobserved) == ["0"]


def test_scripting_a_monitored_model_says_what_to_do() -> None:
    """It fails before torch tries to compile a hook; afterwards the closed model can be scripted."""
    model = net()
    with Monitor(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AttributeError, match="close its monitor"):
            torch.jit.script(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(X), model(X))


def test_the_garbage_collector_may_remove_one_while_another_is_added() -> None:
    """It may come upon a dropped handle's owner in the midst of that."""
    layer, seen = nn.BatchNorm2d(3).eval(), list[str]()

    class Owner:
        def __init__(self) -> None:
            self.itself = self
            self.handle = on_input(layer, lambda *_: seen.append("dropped"))

        def __del__(self) -> None:
            self.handle.remove()

    threshold = gc.get_threshold()
    for _ in range(20):
        Owner()
        gc.set_threshold(1)
        handle = on_input(layer, lambda *_: seen.append("kept"))
        gc.set_threshold(*threshold)
        gc.collect()
        layer(X)
        assert isinstance(vars(layer)["_check_input_dim"], Inlet)
        assert seen == ["kept"]
        seen.clear()
        handle.remove()
