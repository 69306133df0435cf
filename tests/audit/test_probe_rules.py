"""Rules on what a model does when it runs: BN101 to BN106."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from audit.models import (
    BUILDS,
    Build,
    ToTheLongest,
    codes,
    convolutional,
    hits,
    noise,
    norm_names,
    norms,
    reasons,
    residual,
    settled,
    tabular,
)
from audit.programs import every_kind, exported, scripted, silence, traced
from torch import nn

from guardserve import EvalGuard
from guardserve.audit import audit
from guardserve.exceptions import InputError

PROBES = {f"BN10{number}" for number in range(1, 7)}
ROWS = noise(8, 3, seed=5)


class Head(nn.Module):
    """A linear layer, and a function after it."""

    def __init__(self, function: Callable[[torch.Tensor], Any], features: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, features)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        """Apply both."""
        return self.function(self.linear(x))


class Buffered(nn.Module):
    """A normalisation of its own with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.full((3,), 2.0))
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor


class Updating(Buffered):
    """Updates its statistics without a look at the mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        self.running_mean.lerp_(x.mean(0), 0.1)
        return x - self.running_mean


class Replacing(Buffered):
    """Puts other tensors in the place of its statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        self.running_var = 0.9 * self.running_var + 0.1 * x.var(0, correction=0)
        return x / self.running_var.sqrt()


class Outside(nn.Module):
    """Keeps its statistics outside the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.moving_mean = torch.zeros(3)
        self.moving_var = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the batch."""
        mean, var = x.mean(0), x.var(0, correction=0)
        self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean
        self.moving_var = 0.9 * self.moving_var + 0.1 * var
        return (x - mean) / (var + 1e-5).sqrt()


class AlwaysTrains(Buffered):
    """Calls batch_norm with training=True, whatever its mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class BatchesOfTime(nn.Module):
    """A recurrent layer that takes the batch for time."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return states."""
        y: torch.Tensor = self.recurrent(x)[0]
        return y


def without_statistics(build: Build) -> tuple[nn.Module, Any, str]:
    """Take the running statistics from the last layer."""
    model, example = build()
    norms(model)[-1].running_mean = norms(model)[-1].running_var = None
    return model, example, norm_names(model)[-1]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [1, 8])
def test_sound_models_pass_every_probe(build: Build, rows: int) -> None:
    """Vision, tables and sequences, with several inputs and outputs, alone and in batches."""
    model, example = build()
    taken = tuple(tensor[:rows] for tensor in example) if isinstance(example, tuple) else example[:rows]
    report = audit(model, taken)
    assert not codes(report) & PROBES
    unchecked = PROBES - set(report.ran)
    assert unchecked == (set() if rows == 8 else {"BN106"})


@pytest.mark.parametrize("build", [convolutional, residual, tabular])
def test_sound_programs_pass_the_probes_too(build: Build) -> None:
    """Traces, exports and what is made of them."""
    model, example = build()
    for kind, program in every_kind(model, example).items():
        report = audit(program, example)
        assert not report.reaches("error"), kind
        assert PROBES - set(report.ran) <= {"BN106"}, kind


def test_without_an_example_the_probes_are_said_to_be_unchecked() -> None:
    """Nothing is claimed that was not run."""
    report = audit(convolutional()[0])
    assert not PROBES & set(report.ran)
    assert reasons(report, "BN102") == ["an example input is needed"]
    assert "6 rules could not be checked" in report.verdict


# BN101


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "raises ValueError: Expected more than 1 value"),
        (Head(lambda y: y / y.std(0)), "for one row alone output holds"),
        (Head(lambda y: y.squeeze()), "output has shape (4,) for one row, and (5, 4) for 5"),
        (Head(torch.squeeze, features=1), "output has shape () for one row, and (5,) for 5"),
        (Head(lambda y: {"a": y, "b": y.sub(y.mean(0)).div(y.var(0).sqrt())}), "output['b'] holds 4 non-finite"),
    ],
    ids=["raises", "divides by zero", "squeezes", "squeezes to a scalar", "one output of two"],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_bn101_what_fails_for_one_row_only(model: nn.Module, words: str, rows: int) -> None:
    """It raises, is not finite or loses the batch axis alone, whatever the size of the example."""
    report = audit(model.eval(), ROWS[:rows])
    (finding,) = hits(report, "BN101")
    assert (finding.module, finding.severity) == ("", "error")
    assert words in finding.message
    assert "BN105" not in codes(report), "in a batch it is finite"


def test_bn101_is_not_about_programs_made_for_one_batch_size() -> None:
    """An export for four rows says so itself; one for a single row passes."""
    model, example = convolutional()
    report = audit(exported(model, example[:4], dynamic=False), example)
    assert reasons(report, "BN101") == ["the program takes batches of 4 rows only"]
    assert not report.findings
    report = audit(exported(model, example[:1], dynamic=False), example)
    assert {"BN101", "BN103", "BN105"} <= set(report.ran)
    assert reasons(report, "BN102") == ["the program takes a single row, which has no mates"]


# BN102


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("build", [convolutional, residual, tabular])
def test_bn102_batch_statistics_in_eval_mode(build: Build, rows: int) -> None:
    """The layer where the dependence begins is named, and the difference with its tolerance."""
    model, example, name = without_statistics(build)
    taken = tuple(tensor[:rows] for tensor in example) if isinstance(example, tuple) else example[:rows]
    (finding,) = hits(audit(model, taken), "BN102")
    assert (finding.module, finding.severity) == (name, "error")
    assert "it begins in this module" in finding.message
    assert "(tolerance 1e-05)" in finding.message or "(tolerance 0)" in finding.message  # of a label


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), Head(lambda y: y.cumsum(0)))), "1.1"),
        (nn.Sequential(Head(lambda y: y), nn.Softmax(0)), "1"),
        (Head(lambda y: y - y.amax()), ""),
        (BatchesOfTime(), "recurrent"),
        (AlwaysTrains(), ""),
        (Outside(), ""),
        (Head(lambda y: {"logits": y, "label": (y > y.mean(0)).long()}), ""),
        (Head(lambda y: y * len(y)), ""),
    ],
    ids=["sum of those before", "softmax", "maximum", "time", "functional", "home-made", "labels", "size"],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_bn102_whatever_mixes_rows(model: nn.Module, name: str, rows: int) -> None:
    """Not BatchNorm alone makes an answer depend on its mates, and floats are not all that may differ."""
    (finding,) = hits(audit(model.eval(), ROWS[:rows]), "BN102")
    assert (finding.module, finding.severity) == (name, "error")


@pytest.mark.parametrize("first", [[1, 2, 3, 4, 5], [1, 0, 0, 0, 0]])
def test_bn102_padding_to_the_longest_row_wherever_that_is(first: list[int]) -> None:
    """The longest row's own answer does not change: another one's must be looked at."""
    assert "BN102" in codes(audit(ToTheLongest().eval(), torch.tensor([first, [1, 2, 3, 4, 5], [4, 5, 0, 0, 0]])))


def test_bn102_a_dependence_on_the_batch_size_alone() -> None:
    """Where mates make no difference but their number does, the message says so."""
    (finding,) = hits(audit(Head(lambda y: y * len(y)).eval(), ROWS), "BN102")
    assert "alone instead of in a batch of 5" in finding.message


def test_bn102_weak_dependence_is_found() -> None:
    """A thousandth of the output is far beyond rounding between two batches of one size."""
    (finding,) = hits(audit(Head(lambda y: y + 1e-3 * y.mean(0)).eval(), ROWS), "BN102")
    assert finding.severity == "error"


def test_bn102_the_layer_is_named_from_a_graph_that_cannot_be_looked_into() -> None:
    """A trace in training mode depends on its mates, and its graph tells where."""
    model, example = convolutional()
    for program in every_kind(model.train(), example).values():
        (finding,) = hits(audit(program, example), "BN102")
        assert finding.module in {"1", "program"}


@pytest.mark.parametrize(
    "model",
    [
        Head(lambda y: y.softmax(1)),
        Head(lambda y: (y, y.sum(), torch.ones(7))),
        Head(lambda y: [{"box": row} for row in y]),
        Head(lambda y: y.T),
        Head(lambda y: torch.cat((y, -y), 1).reshape(-1, 4)),
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
        Head(lambda y: F.batch_norm(y.reshape(1, -1, 2), None, None, training=True).reshape(y.shape)),
    ],
    ids=["softmax", "aggregates", "list", "batch last", "more rows", "layer norm", "instance norm by batch_norm"],
)
def test_bn102_what_stays_within_a_sample_is_clean(model: nn.Module) -> None:
    """Wherever the batch axis is, and what has none is left out."""
    report = audit(model.eval(), ROWS)
    assert not report.reaches("warning")
    assert "BN102" in report.ran


class ByBatch(nn.Module):
    """Takes its mode as an input."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the masked mean over time."""
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def test_bn102_rows_of_several_inputs_stay_together() -> None:
    """A mask belongs to its row, and integers stay in their range."""
    mask = (torch.arange(6)[None] < torch.arange(1, 7)[:, None]).long()
    assert not audit(ByBatch().eval(), (noise(6, 6, 4), mask)).reaches("warning")
    assert not audit(ByBatch().eval(), {"x": noise(6, 6, 4), "mask": mask}).reaches("warning")


class TakesDict(nn.Module):
    """Takes all its inputs in one dict."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return their sum."""
        return inputs["a"] + inputs["b"]


def test_a_dict_goes_to_the_forward_as_it_takes_it() -> None:
    """By keyword, or as one argument."""
    example = {"a": ROWS, "b": ROWS}
    assert PROBES - set(audit(TakesDict().eval(), example).ran) == {"BN106"}


@pytest.mark.parametrize("function", [F.dropout, lambda y: y + torch.randn_like(y)])
def test_bn102_a_random_output_is_told_and_not_taken_for_dependence(function: Any) -> None:
    """Random numbers are the same in batches of one size; a row alone cannot be compared."""
    report = audit(Head(function, features=64).eval(), ROWS)
    assert codes(report) - {"BN015"} == ({"BN104"} if function is F.dropout else set())
    assert "random, in eval mode too" in reasons(report, "BN102")[0]
    mixed = audit(Head(lambda y: function(y - y.mean(0)), features=64).eval(), ROWS)
    assert "BN102" in codes(mixed)


def test_bn102_dynamic_quantisation_is_a_warning() -> None:
    """Its scale is that of the batch: true, but small, and not for an eval() to mend."""
    torch.manual_seed(0)
    with silence():
        quantise: Any = torch.ao.quantization.quantize_dynamic
        model = quantise(nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 4)).eval(), {nn.Linear})
    report = audit(model, ROWS)
    assert [(found.code, found.severity) for found in report.findings] == [("BN015", "info"), ("BN102", "warning")]


# BN103


@pytest.mark.parametrize(
    ("model", "statistics"),
    [
        (Updating(), "running_mean"),
        (Replacing(), "running_var"),
        (Outside(), "moving_mean and moving_var"),
        (AlwaysTrains(), "running_mean and running_var"),
    ],
)
def test_bn103_statistics_that_inference_changes(model: nn.Module, statistics: str) -> None:
    """In place or by another tensor, in a buffer or outside, the owner and the tensors are named."""
    for wrapped, name in ((model.eval(), ""), (nn.Sequential(nn.Identity(), model).eval(), "1")):
        (finding,) = hits(audit(wrapped, ROWS), "BN103")
        assert (finding.module, finding.severity) == (name, "error")
        assert f"changed {statistics}:" in finding.message


def test_bn103_programs_in_training_mode() -> None:
    """Each layer of a trace or an export made in training mode is found."""
    model, example = convolutional()
    for kind, program in every_kind(model.train(), example).items():
        prefix = "program." if kind == "inside" else ""
        assert [f.module for f in hits(audit(program, example), "BN103")] == [f"{prefix}1", f"{prefix}4"], kind


class Counting(nn.Module):
    """Counts its calls, and keeps the last output in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(3))
        self.calls: torch.Tensor
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Double."""
        self.calls += 1
        self.cache = 2 * x
        return self.cache


def test_bn103_counters_and_caches_are_an_info() -> None:
    """A buffer that changes and no answer with it; an attribute is nothing at all."""

    class Keeping(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x[0].detach().clone()
            return 2 * x

    for model, name in ((Counting(), "calls"), (Keeping(), "last")):
        (finding,) = hits(audit(model.eval(), ROWS), "BN103")
        assert (finding.severity, f"changed {name}" in finding.message) == ("info", True)


def test_bn103_state_that_changes_later_answers_is_an_error() -> None:
    """A memory of the last input, and a weight that shrinks with each call."""

    class Remembering(Counting):
        last: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.last
            self.last = x[0].detach().clone()
            return y

    class Shrinking(Head):
        def forward(self, x: torch.Tensor) -> Any:
            self.linear.weight.data.mul_(0.9)
            return super().forward(x)

    for model, name in ((Remembering(), ""), (Shrinking(lambda y: y), "linear")):
        report = audit(model.eval(), ROWS)
        (finding,) = hits(report, "BN103")
        assert (finding.module, finding.severity) == (name, "error")
        assert "BN102" not in codes(report), "each run begins with the same state"


class Stateful(nn.Module):
    """Carries something from one request to the next outside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.hidden: torch.Tensor | None = None
        self.last: list[torch.Tensor] = []
        self.scale = 1.0
        self.seen: dict[str, Any] = {}


class Recurrent(Stateful):
    """From None to a tensor, which starts anew for another batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what was."""
        y: torch.Tensor = self.linear(x)
        if self.hidden is not None and self.hidden.shape == y.shape:
            y = y + self.hidden
        self.hidden = y
        return y


class Listing(Stateful):
    """Keeps what it was given in a list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subtract the mean of all means."""
        self.last.append(x.mean(0))
        y: torch.Tensor = self.linear(x) - torch.stack(self.last).mean(0)
        return y


class Cooling(Stateful):
    """Changes a number of Python's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale by less each time."""
        self.scale *= 0.9
        y: torch.Tensor = self.linear(x) * self.scale
        return y


class Answering(Stateful):
    """Gives the first answer to everybody."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer from the cache."""
        key = str(tuple(x.shape))
        if key not in self.seen:
            self.seen[key] = self.linear(x)
        y: torch.Tensor = self.seen[key]
        return y


class Stuck(Stateful):
    """Keeps a mask for the first batch size that it meets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mask."""
        if self.hidden is None:
            self.hidden = torch.ones(len(x), 3)
        y: torch.Tensor = self.linear(x) * self.hidden
        return y


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [(Recurrent, "hidden"), (Listing, "last"), (Cooling, "scale"), (Answering, "seen"), (Stuck, "hidden")],
)
def test_bn103_finds_what_is_carried_outside_buffers(kind: type[Stateful], attribute: str) -> None:
    """A hidden state, a list, a number, a cache: the answer to a request changes after another one."""
    model = nn.Sequential(nn.Linear(3, 3), kind()).eval()
    report = audit(model, ROWS)
    finding, *more = hits(report, "BN103")
    assert (finding.module, finding.severity, more) == ("1", "error", [])
    assert f"changed {attribute}" in finding.message
    assert "than from a fresh model" in finding.message or "a fresh model answers" in finding.message
    assert not codes(report) & {"BN101", "BN105"}


def test_bn103_sees_state_that_no_attribute_shows() -> None:
    """Inside an object of no known kind: the answer alone tells."""

    class Opaque:
        __slots__ = ("value",)

        def __init__(self) -> None:
            self.value = 0.0

    class Holding(Stateful):
        def __init__(self) -> None:
            super().__init__()
            self.box = Opaque()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.box.value += 1
            y: torch.Tensor = self.linear(x) + self.box.value
            return y

    (finding,) = hits(audit(Holding().eval(), ROWS), "BN103")
    assert (finding.severity, "what it left behind was not seen" in finding.message) == ("error", True)


def test_bn103_a_state_outside_the_model_is_a_warning() -> None:
    """A fresh copy has it too, and differs from itself; whether it is memory or chance cannot be told."""
    seen: list[float] = []

    class Shared(Stateful):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(float(x.mean()))
            y: torch.Tensor = self.linear(x) + sum(seen)
            return y

    (finding,) = hits(audit(Shared().eval(), ROWS), "BN103")
    assert finding.severity == "warning"
    assert "the same model, input and seed do not give the same answer" in finding.message


class Cached(Stateful):
    """Keeps what depends on the shape of the input alone, and a copy of the last input that nothing reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add positions."""
        if self.hidden is None or len(self.hidden) != x.shape[1]:
            self.hidden = torch.arange(x.shape[1]) / 10
        self.last = [x]
        y: torch.Tensor = self.linear(x + self.hidden)
        return y


class Sampling(Stateful):
    """Draws from a generator of its own, which goes on from request to request."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add noise."""
        y: torch.Tensor = self.linear(x)
        return y + torch.randn(y.shape, generator=self.generator)


@pytest.mark.parametrize("kind", [Cached, Sampling])
def test_bn103_leaves_caches_of_constants_and_generators_alone(kind: type[Stateful]) -> None:
    """What changes no answer is no finding, and chance is no memory."""
    report = audit(kind().eval(), ROWS)
    assert codes(report) == {"BN015"}
    assert "BN103" in report.ran


# BN104


class TrainsLayer(nn.Module):
    """Puts a layer back in training mode, and out of it again."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "linear": nn.Linear(3, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        self.body.train()
        x = self.body["norm"](x)
        self.body.eval()
        return x


class TrainsItself(Buffered):
    """Trains for one function call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        self.train()
        y = F.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), training=self.training)
        self.eval()
        return y


class MonteCarlo(nn.Module):
    """Keeps dropout on to see how sure it is."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop."""
        self.drop.train()
        y: torch.Tensor = self.drop(x)
        return y


@pytest.mark.parametrize(("model", "name"), [(TrainsLayer(), "body"), (TrainsItself(), ""), (MonteCarlo(), "drop")])
def test_bn104_modules_that_train_during_the_forward(model: nn.Module, name: str) -> None:
    """Also for a part of the forward only, and for functions of the module's own."""
    for wrapped, prefix in ((model.eval(), ""), (nn.Sequential(model).eval(), "0")):
        findings = hits(audit(wrapped, ROWS), "BN104")
        assert [(finding.module, finding.severity) for finding in findings] == [
            (".".join(filter(None, (prefix, name))), "error")
        ]


class Listed(nn.Module):
    """Keeps its layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run them."""
        for layer in self.layers:
            x = layer(x)
        return x


class Made(nn.Module):
    """Makes a dropout in its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop."""
        y: torch.Tensor = nn.Dropout(0.5)(x)
        return y


@pytest.mark.parametrize(("model", "kind"), [(Listed(), "BatchNorm1d"), (Made(), "Dropout")])
def test_bn104_layers_that_no_eval_reaches(model: nn.Module, kind: str) -> None:
    """They are no submodules, so that their flags are not seen before they run."""
    for wrapped, name in ((model.eval(), ""), (nn.Sequential(nn.Identity(), model).eval(), "1")):
        (finding,) = hits(audit(wrapped, ROWS), "BN104")
        assert (finding.module, finding.severity) == (name, "error")
        assert f"a {kind} that is no submodule" in finding.message
        assert "submodule" in finding.remedy


def test_bn104_what_the_guard_mends_is_not_reported_twice() -> None:
    """EvalGuard keeps the layer in eval mode during the forward, so that mates and statistics are safe with it."""
    model = TrainsLayer().eval()
    report = audit(model, ROWS)
    assert not codes(report) & {"BN102", "BN103"}
    EvalGuard(model)(ROWS)
    assert torch.equal(model.get_buffer("body.norm.running_mean"), torch.zeros(3))


def test_bn104_is_not_about_a_model_that_was_training_before() -> None:
    """That is BN001; during a forward that begins in eval mode nothing changes."""
    model, example = residual()
    assert codes(audit(model.train(), example)) == {"BN001"}


# BN105


def poison(build: Build) -> tuple[nn.Module, Any, str]:
    """Make a running variance negative."""
    model, example = build()
    variance = norms(model)[-1].running_var
    assert variance is not None
    variance[0] = -1.0
    return model, example, norm_names(model)[-1]


@pytest.mark.parametrize("build", BUILDS)
def test_bn105_a_damaged_layer_is_named(build: Build) -> None:
    """The output, the module, the operator and its statistics are told."""
    model, example, name = poison(build)
    (finding,) = hits(audit(model, example), "BN105")
    assert (finding.module, finding.severity) == (name, "error")
    assert "it arose in" in finding.message
    assert "running_var -1" in finding.message


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (torch.log, "log"),
        (lambda y: 1 / (y - y), "reciprocal"),
        (lambda y: {"deep": [y * float("inf")]}, "['deep'][0]"),
    ],
)
def test_bn105_arithmetic_that_is_not_finite(function: Any, word: str) -> None:
    """Whatever makes it, for one row and for many."""
    for rows in (1, 8):
        report = audit(Head(function).eval(), ROWS[:rows])
        (finding,) = hits(report, "BN105")
        assert word in finding.message
        assert "BN101" not in codes(report), "in a batch it is not finite either"


def test_bn105_one_bad_row_of_many_is_found() -> None:
    """All rows of the example are run, not the first alone."""
    rows = noise(40, 3)
    rows[33] = 90
    (finding,) = hits(audit(Head(lambda y: y.square().exp()).eval(), rows), "BN105")
    assert "the first at index (33, " in finding.message


def test_programs_are_run_too() -> None:
    """A damaged layer shows in TorchScript and in exports."""
    model, example, _ = poison(convolutional)
    for program in (traced(model, example), scripted(model), exported(model, example)):
        assert "BN105" in codes(audit(program, example))


# BN106


def other_data(build: Build) -> tuple[nn.Module, Any]:
    """Give a model the statistics of other data than its example."""
    model, example = build()
    settled(
        model,
        tuple(x * 30 + 40 if x.is_floating_point() else x for x in example)
        if isinstance(example, tuple)
        else example * 30 + 40,
    )
    return model, example


@pytest.mark.parametrize("build", [convolutional, residual, tabular])
def test_bn106_statistics_of_other_data(build: Build) -> None:
    """The layer that fits worst is named, with how far off it is."""
    model, example = other_data(build)
    (finding,) = hits(audit(model, example), "BN106")
    assert finding.severity == "warning"
    assert finding.module in norm_names(model)
    assert "in the median channel" in finding.message


@pytest.mark.parametrize("factor", [255.0, 1 / 255])
@pytest.mark.parametrize("build", [convolutional, residual])
def test_bn106_another_scale_of_the_input(build: Build, factor: float) -> None:
    """The commonest mistake of preprocessing."""
    model, example = build()
    assert "BN106" in codes(audit(model, example * factor + 3))


def test_bn106_needs_rows_and_layers() -> None:
    """Fewer than eight rows, and graphs, are said to be unchecked."""
    model, example = convolutional()
    assert reasons(audit(model, example[:7]), "BN106") == [
        "an example of at least 8 rows of real data is needed, this one has 7"
    ]
    assert "BN106" not in audit(traced(model, example), example).ran


def test_bn106_switches_batchnorm_alone() -> None:
    """Dropout, and code that reads its flag, stay in eval mode."""
    flags: list[bool] = []

    class Spy(nn.Dropout):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the base class's name
            flags.append(self.training)
            return super().forward(input)

    model, example = settled(nn.Sequential(Spy(0.9), nn.Linear(3, 4), nn.BatchNorm1d(4)), ROWS)
    flags.clear()
    assert "BN106" in audit(model, example).ran
    assert flags
    assert not any(flags)


# examples that cannot be used


def test_an_example_that_the_model_does_not_take_is_told() -> None:
    """Every probe says what the model raised, and none of them is claimed."""
    model, _ = convolutional()
    report = audit(model, noise(8, 4, 12, 12))
    assert not PROBES & set(report.ran)
    assert "does not run on the example: RuntimeError: Given groups=1" in reasons(report, "BN102")[0]


def test_an_example_with_nan_is_not_run() -> None:
    """It could not show anything."""
    report = audit(convolutional()[0], torch.full((8, 3, 12, 12), float("nan")))
    assert reasons(report, "BN105") == ["the example itself holds NaN or infinity"]


@pytest.mark.parametrize("example", [torch.ones(()), torch.ones(0, 3), (), {}, "photo"])
def test_what_has_no_rows_is_no_example(example: Any) -> None:
    """A scalar, an empty batch, nothing, or something else."""
    with pytest.raises(InputError, match="first axis is the batch"):
        audit(Head(lambda y: y).eval(), example)


def test_a_forward_may_need_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part under DistributedDataParallel would wait for its group for ever, so it is not run."""

    class Distributed(nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def __deepcopy__(self, memo: object) -> Distributed:
            return Distributed().eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.Sequential(Distributed()).eval()
    assert "BN105" in audit(model, ROWS).ran
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert reasons(audit(model, ROWS), "BN105") == ["0 runs only together with the other processes of its group"]


# outputs of other kinds


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.numpy(),
        lambda y: y.tolist(),
        lambda y: {"scores": y.numpy().astype(">f8"), "best": y[:, 0].tolist()},
        lambda y: [{"score": float(row[0]), "all": row} for row in y],
        lambda y: {"items": [[row, row + 1] for row in y], "sum": y.sum(1)},
        lambda y: y[:, 0],
        lambda y: SimpleNamespace(logits=y),
    ],
    ids=["array", "lists", "dict", "list of dicts", "list in a dict", "one axis", "object"],
)
def test_outputs_of_any_kind_are_compared(function: Callable[[torch.Tensor], Any]) -> None:
    """Arrays, numbers and lists: sound ones pass, mixed ones are found, and so is a NaN."""
    sound = audit(Head(function).eval(), ROWS)
    assert not codes(sound) - {"BN015"}, sound.findings
    assert {"BN101", "BN102", "BN103", "BN105"} <= set(sound.ran)
    assert not [skip for skip in sound.skipped if skip.code != "BN106"]
    mixed = audit(Head(lambda y: function(y - y.mean(0))).eval(), ROWS)
    assert "BN102" in codes(mixed)
    bad = audit(Head(lambda y: function((y - 100).log())).eval(), ROWS)
    assert "BN105" in codes(bad)


def test_outputs_that_cannot_be_read_are_told() -> None:
    """Labels as text are not compared, and a model that gives nothing else is not checked."""
    mixed = audit(Head(lambda y: (y, ["cat" if row[0] > 0 else "dog" for row in y])).eval(), ROWS)
    assert not mixed.reaches("warning")
    for code in ("BN102", "BN105"):
        assert code in mixed.ran
        assert "output[1][0] is a str" in reasons(mixed, code)[0]
    texts = audit(Head(lambda y: [str(row) for row in y]).eval(), ROWS)
    assert not {"BN102", "BN105"} & set(texts.ran)
    assert "is a str, which is not looked at" in reasons(texts, "BN105")[0]


def test_bn102_values_of_the_whole_batch_are_told() -> None:
    """A mean over the batch is no answer to a row: a warning, or an info beside answers; a constant is nothing."""
    (alone,) = hits(audit(Head(lambda y: y.mean()).eval(), ROWS), "BN102")
    assert (alone.severity, "no batch axis" in alone.message) == ("warning", True)
    (beside,) = hits(audit(Head(lambda y: (y, y.square().mean())).eval(), ROWS), "BN102")
    assert (beside.severity, "output[1]" in beside.message) == ("info", True)
    constant = audit(Head(lambda y: (y, torch.tensor(2.0), torch.eye(5))).eval(), ROWS)
    assert not codes(constant) - {"BN015"}
    assert not reasons(constant, "BN102")
    ragged = audit(Head(lambda y: (y, y[y > 0])).eval(), ROWS)
    assert not codes(ragged) - {"BN015"}
    assert "the rows of output[1]" in reasons(ragged, "BN102")[0]


def test_bn105_masks_of_minus_infinity_are_a_warning() -> None:
    """A constant mask, one that the code writes, one that it returns; a NaN, or infinity for some inputs, is not."""
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    causal = torch.full((5, 5), -torch.inf).triu(1)
    designs: list[Callable[[torch.Tensor], Any]] = [
        lambda y: y + mask,
        lambda y: y.masked_fill(y < 0, -torch.inf),
        lambda y: torch.where(y > 0, y, -torch.inf),
        lambda y: {"logits": y, "mask": causal},
    ]
    for design in designs:
        (finding,) = hits(audit(Head(design).eval(), ROWS), "BN105")
        assert finding.severity == "warning"
        assert "minus infinity" in finding.message
    faults: list[Callable[[torch.Tensor], Any]] = [
        lambda y: y.relu().log(),
        lambda y: y + torch.tensor([0.0, torch.nan, 0.0, 0.0]),
        lambda y: y - mask,
        lambda y: (y * 0).log(),
    ]
    for fault in faults:
        (finding,) = hits(audit(Head(fault).eval(), ROWS), "BN105")
        assert finding.severity == "error"


class Dropping(nn.Module):
    """Drops by a function of the input and of its own mode."""

    def __init__(self, function: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 64)
        self.norm = nn.BatchNorm1d(64)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop."""
        return self.function(self.norm(self.linear(x)), self.training)


def attention(y: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    """Attend to itself."""
    return F.scaled_dot_product_attention(y, y, y, dropout_p=dropout_p)


@pytest.mark.parametrize(
    "function",
    [
        lambda y, _: F.dropout(y, 0.5),
        lambda y, _: F.dropout(y, p=0.1, training=True),
        lambda y, _: torch.dropout(y, 0.5, True),
        lambda y, _: F.dropout1d(y[..., None]).squeeze(-1),
        lambda y, _: attention(y.reshape(-1, 8, 8), dropout_p=0.3).flatten(1),
    ],
    ids=["default", "named", "torch", "channels", "attention"],
)
def test_bn104_a_function_told_to_drop(function: Any) -> None:
    """It has no mode that eval could change, and it drops by default."""
    model = nn.Sequential(nn.Linear(3, 3), Dropping(function)).eval()
    (finding,) = hits(audit(model, ROWS), "BN104")
    assert (finding.module, finding.severity) == ("1", "error")
    assert "told to drop" in finding.message


@pytest.mark.parametrize(
    "function",
    [
        lambda y, training: F.dropout(y, 0.5, training),
        lambda y, training: F.dropout(y, training=training),
        lambda y, _: F.dropout(y, 0.0),
        lambda y, training: torch.dropout(y, 0.5, training),
        lambda y, _: attention(y.reshape(-1, 8, 8)).flatten(1),
        lambda y, _: y + 0 * F.dropout(torch.ones(64)),
    ],
    ids=["placed", "named", "zero", "torch", "attention", "of a constant"],
)
def test_bn104_a_function_that_does_not_drop_is_clean(function: Any) -> None:
    """It is told the mode, or a probability of zero, or drops nothing of the input."""
    settled_model, _ = settled(Dropping(function), ROWS)
    report = audit(settled_model, ROWS)
    assert not report.reaches("warning")
    assert "BN104" in report.ran


def test_bn003_dropout_that_is_fixed_in_a_graph() -> None:
    """In traces and exports made in training mode, of a layer and of a function; those made in eval mode are clean."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3), Dropping(lambda y, training: F.dropout(y, 0.2, training)))
    model[2].norm = nn.Identity()
    for training in (True, False):
        program = exported(model.train(training), ROWS)
        for subject in (traced(model.train(training), ROWS), program, program.module()):
            found = [finding for finding in hits(audit(subject), "BN003") if "dropout" in finding.message]
            assert len(found) == (2 if training else 0)
            assert all("always drops" in finding.message for finding in found)
    assert not hits(audit(scripted(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3)))), "BN003")
