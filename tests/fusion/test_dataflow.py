"""Which layers are fused: those, and only those, of which the data flow proves that it is sound."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fusible import answer, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from guardserve import Monitor
from guardserve.fusion import fuse, fusion_report

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Step:
    """One operation of a random network, on values that earlier steps gave; value 0 is the input."""

    operation: str
    inputs: tuple[int, ...]


NORMS = [f"norm{index}" for index in range(4)]
OPERATIONS = ["conv", "norm", "dropout", "identity", "relu", "relu_", "add"]


class Network(nn.Module):
    """Runs steps one after the other, and returns some of the values."""

    def __init__(self, steps: tuple[Step, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.outputs = outputs
        convs = [
            nn.Conv2d(3, 3, 3, padding=1, bias=False),
            nn.Conv2d(3, 3, 1, groups=3),
            nn.ConvTranspose2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect"),
        ]
        norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.SyncBatchNorm(3), nn.BatchNorm2d(3)]
        self.parts = nn.ModuleDict({"dropout": nn.Dropout2d(), "identity": nn.Identity(), "relu": nn.ReLU()})
        for index in range(4):
            self.parts[f"conv{index}"] = convs[index]
            self.parts[f"norm{index}"] = norms[index]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the steps."""
        values = [x]
        for step in self.steps:
            given = [values[index] for index in step.inputs]
            if step.operation == "add":
                values.append(given[0] + given[1])
            elif step.operation == "relu_":
                values.append(torch.relu_(given[0]))
            else:
                values.append(self.parts[step.operation](given[0]))
        return tuple(values[index] for index in self.outputs)

    def fusible(self) -> set[str]:
        """Work out from the steps which norms can be fused, as a person would."""
        found = set()
        for norm in NORMS:
            calls = [step for step in self.steps if step.operation == norm]
            sources = {self.sole_source(step.inputs[0]) for step in calls}
            if len(sources) == 1:
                (source,) = sources
                if sum(step.operation == source for step in self.steps) == len(calls):
                    found.add(f"parts.{norm}")
        return found

    def sole_source(self, value: int) -> str | None:
        """Name the convolution that a value comes from, if nothing but the one who asks uses it."""
        users = sum(value in step.inputs for step in self.steps) + (value in self.outputs)
        step = self.steps[value - 1] if value else Step("input", ())
        if users != 1:
            return None
        if step.operation in ("dropout", "identity"):
            return self.sole_source(step.inputs[0])
        return step.operation if step.operation.startswith("conv") else None


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Draw a network that branches, adds, reuses modules and works in place."""
    steps: list[Step] = []
    pairs = [["conv", "norm"], ["conv", "dropout", "norm"]]
    for index in range(draw(st.integers(3, 7))):
        block = draw(st.one_of(st.sampled_from(pairs), st.sampled_from([[name] for name in OPERATIONS])))
        for position, operation in enumerate(block):
            before = len(steps)
            reused = draw(st.integers(0, 9)) == 9
            number = str((0 if reused else index) % 4) if operation in ("conv", "norm") else ""
            others = st.just(before) if position else st.integers(max(0, before - 3), before)
            inputs = tuple(draw(others) for _ in range(2 if operation == "add" else 1))
            steps.append(Step(operation + number, inputs))
    outputs = {len(steps), *draw(st.lists(st.integers(0, len(steps)), max_size=2))}
    torch.manual_seed(0)
    return trained(Network(tuple(steps), tuple(sorted(outputs))).double())


@settings(max_examples=120)
@given(networks(), st.booleans())
def test_random_networks_are_fused_where_it_is_sound_and_answer_alike(model: Network, with_example: bool) -> None:
    """Branches, residuals, reuse, dropout and work in place: what can be is fused, nothing else, all is equal."""
    x = X.double()
    fused = fuse(model, x) if with_example else fuse(model)
    report = fusion_report(fused)
    assert set(report.fused) == model.fusible()
    assert set(report.fused) | set(report.skipped) == {f"parts.{norm}" for norm in NORMS}
    with Monitor(model.eval()) as plain_monitor, Monitor(fused) as fused_monitor:
        expected, actual = answer(model, x.clone()), answer(fused, x.clone())
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            model(x.clone())
            fused(x.clone())
        before = {layer.name: layer for layer in plain_monitor.snapshot().layers}
        after = {layer.name: layer for layer in fused_monitor.snapshot().layers}
    assert before.keys() == after.keys()
    for name, layer in before.items():
        for size in ("mean_shift", "log_std_ratio", "wasserstein2"):
            assert getattr(after[name], size) == pytest.approx(getattr(layer, size), rel=1e-6, abs=1e-9)


class Net(nn.Module):
    """Modules to make a forward of."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(3, 3, 1)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout()
        self.register_buffer("grid", torch.ones(1, 3, 1, 1))
        self.kept: Any = None
        trained(self)

    def forward(self, x: torch.Tensor) -> Any:
        """Do what the test asks for."""
        return self.body(self, x)


def keep(net: Net, value: torch.Tensor) -> torch.Tensor:
    """Keep a value in an attribute."""
    net.kept = value
    return value


def also_used(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Add a convolution's own output to the normalised one."""
    y = net.conv(x)
    z: torch.Tensor = net.norm(y) + y
    return z


def used_past_dropout(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Add what dropout has handed on to its normalised self."""
    y = net.dropout(net.conv(x))
    z: torch.Tensor = net.norm(y) + y
    return z


def norm_used_twice(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Use a norm's output twice."""
    y = net.norm(net.conv(x))
    z: torch.Tensor = y + net.conv2(y)
    return z


def changed_in_place(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Change a convolution's output behind the norm's back."""
    y = net.conv(x)
    y.add_(1)
    z: torch.Tensor = net.norm(y)
    return z


def returned(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a convolution's output beside the normalised one."""
    y = net.conv(x)
    return net.norm(y), y


Body = Callable[[Any, torch.Tensor], Any]
USED = "the output of conv, which it follows, is used elsewhere too"
REASONS: dict[str, tuple[Body, str]] = {
    "input": (lambda n, x: n.norm(x), "it follows the model's input, not a convolution or linear layer"),
    "module": (
        lambda n, x: n.norm(n.relu(n.conv(x))),
        "it follows relu (ReLU), not a convolution or linear layer",
    ),
    "function": (
        lambda n, x: n.norm(torch.cat([n.conv(x)])),
        "it follows cat, not a convolution or linear layer",
    ),
    "method": (lambda n, x: n.norm(n.conv(x).abs()), "it follows abs, not a convolution or linear layer"),
    "buffer": (lambda n, x: n.norm(n.grid) + x, "it follows grid, not a convolution or linear layer"),
    "constant": (
        lambda n, x: n.norm(torch.zeros(1, 3, 1, 1)) + x,
        "it follows _tensor_constant0, not a convolution or linear layer",
    ),
    "used": (also_used, USED),
    "used past dropout": (used_past_dropout, USED),
    "returned": (returned, USED),
    "in place": (changed_in_place, USED),
    "kept": (
        lambda n, x: n.norm(keep(n, n.conv(x))),
        "the output of conv, which it follows, is kept, and may be read elsewhere",
    ),
    "shared norm": (
        lambda n, x: n.norm(n.conv(x)) + n.norm(n.conv2(x)),
        "it is shared: it follows conv and conv2",
    ),
    "shared convolution": (
        lambda n, x: n.norm(n.conv(x)) + n.conv(x),
        "conv, which it follows, is also called without it",
    ),
    "not called": (lambda n, x: n.conv(x), "the forward does not call it, or not where a graph shows it"),
    "functional": (
        lambda n, x: nn.functional.batch_norm(n.conv(x), n.norm.running_mean, n.norm.running_var),
        "the forward does not call it, or not where a graph shows it",
    ),
    "weight read": (
        lambda n, x: n.norm(n.conv(x)) * n.conv.weight.sum(),
        "the forward reads parameters of conv beside calling it",
    ),
    "statistics read": (
        lambda n, x: n.norm(n.conv(x)) - n.norm.running_mean.sum(),
        "the forward reads parameters of norm beside calling it",
    ),
}
FUSED: dict[str, Body] = {
    "twice together": lambda n, x: n.norm(n.conv(n.norm(n.conv(x)))),
    "dropout between": lambda n, x: n.norm(n.dropout(n.conv(x))),
    "by keyword": lambda n, x: n.norm(input=n.conv(input=x)),
    "metadata read": lambda n, x: n.norm(n.conv(x.to(n.conv.weight.dtype, non_blocking=True))),
    "in place after": lambda n, x: n.norm(n.conv(x)).relu_() + n.conv2(x),
    "norm's output used twice": norm_used_twice,
    "own attributes read": lambda n, x: n.norm(n.conv(x)) * n.norm.num_features,
}


def behind_a_branch(body: Body) -> Body:
    """Let a body branch on its input's shape, which a symbolic trace cannot follow."""
    return lambda n, x: body(n, x) if x.shape[1] == 3 else x


@pytest.mark.parametrize(("body", "reason"), REASONS.values(), ids=REASONS)
def test_what_the_data_flow_forbids_is_not_fused_with_the_reason(body: Body, reason: str) -> None:
    """It is named, for a trace as for an export."""
    model = Net(body)
    assert dict(fusion_report(fuse(model)).skipped) == {"norm": reason}
    exported = fusion_report(fuse(Net(behind_a_branch(body)), X))
    assert list(exported.skipped) == ["norm"]
    if not reason.startswith("it follows") and body not in (REASONS["kept"][0], changed_in_place):
        assert exported.skipped["norm"] == reason


@pytest.mark.parametrize("body", FUSED.values(), ids=FUSED)
def test_what_the_data_flow_allows_is_fused(body: Body) -> None:
    """It is fused by a trace as by an export, and the answers agree."""
    for model, example in ((Net(body), None), (Net(behind_a_branch(body)), X)):
        fused = fuse(model, example)
        assert fusion_report(fused).fused == ("norm",), fusion_report(fused)
        torch.testing.assert_close(answer(fused, X), answer(model, X), rtol=1e-5, atol=1e-5)


def test_a_norm_whose_own_output_is_kept_is_fused() -> None:
    """Only what the convolution gives must not be seen; what the norm gives is the same as ever."""
    assert fusion_report(fuse(Net(lambda n, x: keep(n, n.norm(n.conv(x)))))).fused == ("norm",)


def test_tied_weights_that_are_read_by_their_other_name_are_noticed() -> None:
    """Reading conv2.weight reads conv's when the two are one parameter."""
    model = Net(lambda n, x: n.norm(n.conv(x)) * n.conv2.weight.sum())
    model.conv2.weight = model.conv.weight
    reason = "the forward reads parameters of conv beside calling it"
    assert fusion_report(fuse(model)).skipped == {"norm": reason}
    model.body = behind_a_branch(model.body)
    assert fusion_report(fuse(model, X)).skipped == {"norm": reason}


def test_a_norm_with_two_names_or_reached_by_a_list_is_fused_wherever_it_is_called() -> None:
    """Every name and reference leads to what is left of the layer, not to the layer itself."""
    model = Net(lambda n, x: n.alias(n.convs[0](x)) if n.listed else n.norms[0](n.conv(x)))
    model.alias = model.norm
    model.convs, model.norms = [model.conv], [model.norm]  # type: ignore[assignment]
    for listed in (True, False):
        model.listed = listed  # type: ignore[assignment]
        fused = fuse(model)
        assert fusion_report(fused).fused == ("norm",)
        torch.testing.assert_close(answer(fused, X), answer(model, X), rtol=1e-5, atol=1e-5)


def test_a_hook_of_a_container_that_keeps_the_output_is_noticed() -> None:
    """Who hooks what contains the convolution may read its output, although the graph does not show it."""
    seen: list[torch.Tensor] = []

    class Box(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y

    model = nn.Sequential(Box(), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda _, __, output: seen.append(output))
    assert fusion_report(fuse(model)).skipped == {
        "1": "the output of 0.conv, which it follows, is kept, and may be read elsewhere"
    }
    branching = Net(behind_a_branch(lambda n, x: n.norm(n.box(x))))
    branching.box = model[0]
    assert (
        "(DataflowError: hooks may read what a graph does not show)"
        in fusion_report(fuse(branching, X)).skipped["norm"]
    )


def test_a_hook_on_dropout_keeps_it_from_being_looked_through() -> None:
    """It may change what dropout hands on, which the norm then normalises."""
    model = Net(lambda n, x: n.norm(n.dropout(n.conv(x))))
    model.dropout.register_forward_hook(lambda _, __, output: output * 2)
    reason = "it follows dropout (Dropout), not a convolution or linear layer"
    assert fusion_report(fuse(model, X)).skipped == {"norm": reason}


def test_dropout_that_is_never_switched_off_is_not_looked_through() -> None:
    """Monte Carlo dropout changes what it is given, in eval mode too."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = net.norm(nn.functional.dropout(net.conv(x)))
        return y

    reason = "it follows dropout, not a convolution or linear layer"
    for model in (Net(body), Net(behind_a_branch(body))):
        assert fusion_report(fuse(model, X)).skipped == {"norm": reason}


def test_containers_of_torch_are_looked_into() -> None:
    """DataParallel and the like hold what is to be fused, and are no single operation."""

    class Container(Net):
        pass

    Container.__module__ = "torch.nn.parallel"
    model = nn.Sequential(Container(lambda n, x: n.norm(n.conv(x))))
    assert fusion_report(fuse(model)).fused == ("0.norm",)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda n, x: n.norm(n.conv(x)) if x.shape[0] > 1 else x, "TraceError: symbolically traced variables"),
        (lambda n, x: sum(n.norm(n.conv(row[None])) for row in x), "TraceError: "),
        (lambda n, x: n.norm(n.conv(x[:, : int(x.shape[1])])), "TypeError: "),
    ],
    ids=["branch", "loop", "integer"],
)
def test_a_forward_that_cannot_be_traced_is_fused_with_an_example_only(body: Body, says: str) -> None:
    """Without an example nothing is proved, so nothing is fused, and the remedy is named; with one it is exported."""
    model = Net(body)
    reason = fusion_report(fuse(model)).skipped["norm"]
    assert reason.startswith(f"its forward cannot be traced ({says}")
    assert reason.endswith("; an example input may help")
    fused = fuse(model, X)
    assert fusion_report(fused).fused == ("norm",)
    torch.testing.assert_close(answer(fused, X), answer(model, X), rtol=1e-5, atol=1e-5)


def test_control_flow_that_depends_on_values_is_never_fused() -> None:
    """One example proves nothing for another input, on which the forward may go another way."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.conv(x)
        z: torch.Tensor = net.norm(y) if x.sum() > 0 else y
        return z

    reason = fusion_report(fuse(Net(body), X)).skipped["norm"]
    assert reason.startswith("its forward cannot be traced (TraceError: ")
    assert " nor exported (GuardOnDataDependentSymNode: " in reason


def test_values_that_a_model_caches_on_its_first_call_keep_it_from_nothing() -> None:
    """A cache that is filled once is no trace of every forward."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        if net.kept is None:
            net.kept = torch.ones(x.shape[-1])
        z: torch.Tensor = net.norm(net.conv(x)) * net.kept
        return z

    model = Net(behind_a_branch(body))
    assert fusion_report(fuse(model, X)).fused == ("norm",)
    assert model.kept is None


def test_a_forward_put_on_the_instance_is_not_overlooked() -> None:
    """Tracing would read the class's forward, which is not what runs; the export runs the right one."""
    model = Net(lambda n, x: n.norm(n.conv(x)))
    model.forward = types.MethodType(also_used, model)  # type: ignore[method-assign]
    assert "it is an attribute of the instance" in fusion_report(fuse(model)).skipped["norm"]
    assert fusion_report(fuse(model, X)).skipped == {"norm": USED}


class Optional(nn.Module):
    """A forward with parameters that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, raw: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise, and with a mask return also what was not."""
        y = self.conv(x)
        if raw or mask is not None:
            return self.norm(y), y
        z: torch.Tensor = self.norm(y)
        return z


def test_the_flow_is_that_of_the_arguments_of_the_example() -> None:
    """Parameters that the example leaves out have their defaults; those that it gives are given."""
    model = trained(Optional())
    assert fusion_report(fuse(model)).fused == ("norm",)
    assert fusion_report(fuse(model, X)).fused == ("norm",)
    assert fusion_report(fuse(model, {"x": X})).fused == ("norm",)
    assert fusion_report(fuse(model, (X, X))).skipped == {"norm": USED}
    assert fusion_report(fuse(model, {"x": X, "mask": X})).skipped == {"norm": USED}
    assert fusion_report(fuse(model, {"x": X, "raw": True})).skipped == {"norm": USED}
