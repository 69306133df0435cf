"""Monitoring a compiled model: one graph, no compilation as batch sizes vary, and the statistics of the eager model."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn

from guardserve import EvalGuard, Monitor, compiled, fuse
from guardserve.monitor import Snapshot
from guardserve.observation.taps import MOST_MISSES, _Tap

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.usefixtures("fresh_compiler"),
]


class Net(nn.Module):
    """Two convolutions with BatchNorm, frames laid into the batch between them, and a head with BatchNorm."""

    def __init__(self, frames: int = 1) -> None:
        super().__init__()
        self.frames = frames
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.deep_bn = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head, self.head_bn = nn.Linear(16, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, shape ``(N * frames, 4)``."""
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.deep_bn(self.deep(x.repeat_interleave(self.frames, 0))))
        y: torch.Tensor = self.head_bn(self.head(x.mean((2, 3))))
        return y


def net(frames: int = 1) -> Net:
    """Return a net whose running statistics are not the defaults."""
    torch.manual_seed(0)
    model = Net(frames)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 16, 16))
    return model.eval()


def batches(*sizes: int) -> list[torch.Tensor]:
    """Return inputs with those batch sizes."""
    return [torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]


def watch(monitored: nn.Module, called: Any, inputs: list[torch.Tensor], values: int | None = None) -> Snapshot:
    """Return what a monitor on one module sees while another is called."""
    with Monitor(monitored, values=values) as monitor, torch.inference_mode():
        for x in inputs:
            called(x)
        return monitor.snapshot()


def assert_same(left: Snapshot, right: Snapshot) -> None:
    """Compare two snapshots to rounding."""
    assert left.samples == right.samples
    assert [layer.name for layer in left.layers] == [layer.name for layer in right.layers]
    for a, b in zip(left.layers, right.layers, strict=True):
        assert a.samples == b.samples
        for name in ("mean_shift", "log_std_ratio", "wasserstein2"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_shows_the_statistics_of_the_eager_one(frames: int, fused: bool) -> None:
    """Fused or not, with rows that are no samples or not: the same to rounding."""
    model = fuse(net(frames)) if fused else net(frames)
    inputs = batches(1, 4, 2, 7)
    eager = watch(model, model, inputs)
    compiled = copy.deepcopy(model)
    assert_same(watch(compiled, torch.compile(compiled, fullgraph=True), inputs), eager)


def test_batch_sizes_vary_without_another_compilation() -> None:
    """One graph for batch size 1, one for all others; none breaks, and every sample is counted, guarded too.

    Convolutions themselves have a graph of their own for sizes from 16 on.
    """
    model = net()
    with Monitor(model) as monitor:
        compiled: Any = torch.compile(model, fullgraph=True)
        guard = EvalGuard(compiled)
        for x in batches(1, 2, 3):
            guard(x)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x in batches(5, 1, 8, 2, 12, 3):
                guard(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert not torch._dynamo.utils.counters["graph_break"]
        assert monitor.snapshot().samples == 6 + 31


def test_a_monitor_on_the_compiled_module_is_one_on_the_model() -> None:
    """Layers have the names that they have in the model, so that profiles fit."""
    model = net()
    compiled = torch.compile(model, fullgraph=True)
    with Monitor(compiled) as monitor, torch.inference_mode():  # type: ignore[arg-type]
        compiled(batches(3)[0])
        assert monitor.layers == ("bn", "deep_bn", "head_bn")
        assert monitor.snapshot().samples == 3


class Twice(Net):
    """The last layer runs twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, normalised again."""
        y: torch.Tensor = self.head_bn(super().forward(x))
        return y


class Early(Net):
    """The last layer does not run, and the graph breaks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sums of the second layer's channels."""
        x = torch.relu(self.bn(self.conv(x)))
        torch._dynamo.graph_break()
        return torch.relu(self.deep_bn(self.deep(x))).sum((2, 3))


class Broken(Net):
    """The graph breaks before the last layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the net does."""
        x = torch.relu(self.deep_bn(self.deep(torch.relu(self.bn(self.conv(x))))))
        torch._dynamo.graph_break()
        y: torch.Tensor = self.head_bn(self.head(x.mean((2, 3))))
        return y


class Backwards(nn.Sequential):
    """The layers run in the order opposite to that of their registration."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        for layer in reversed(list(self)):
            x = layer(x)
        return x


class Again(Net):
    """The model calls itself, and normalises before and after that."""

    def forward(self, x: torch.Tensor, *, again: bool = True) -> torch.Tensor:
        """Return features of the input and of its mirror image."""
        y = torch.relu(self.bn(self.conv(x)))
        if again:
            return torch.add(self(x.flip(-1), again=False), self.head_bn(self.head(self.deep(y).mean((2, 3)))))
        z: torch.Tensor = self.head_bn(self.head(torch.relu(self.deep_bn(self.deep(y))).mean((2, 3))))
        return z


@pytest.mark.parametrize("build", [net, lambda: Again().eval()])
def test_a_monitored_part_of_a_larger_graph_is_seen(build: Callable[[], nn.Module]) -> None:
    """Where the model's own hooks are in the graph, operators begin and end its forwards."""
    model = build()
    inputs = batches(1, 4, 2, 7)
    eager = watch(model, model, [x + 1 for x in inputs])

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x + 1)
            return 2 * y

    assert_same(watch(model, torch.compile(Larger(), fullgraph=True), inputs), eager)


class Failing(Net):
    """The graph breaks, and the rest of the forward may fail."""

    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the net does, or raise."""
        x = torch.relu(self.deep_bn(self.deep(torch.relu(self.bn(self.conv(x))))))
        torch._dynamo.graph_break()
        if self.fails:
            raise RuntimeError("failed")
        y: torch.Tensor = self.head_bn(self.head(x.mean((2, 3))))
        return y


def test_forwards_that_failed_in_a_larger_graph_are_left_out() -> None:
    """Those that follow are seen."""
    model = Failing().eval()
    compiled = torch.compile(nn.Sequential(nn.ReLU(), model), backend="eager")
    (x,) = batches(2)
    with Monitor(model) as monitor, torch.inference_mode():
        compiled(x)
        model.fails = True
        for _ in range(2):
            with pytest.raises(RuntimeError, match="failed"):
                compiled(x)
        model.fails = False
        for _ in range(3):
            compiled(x)
        assert monitor.snapshot().samples == 8


@pytest.mark.parametrize(
    "build", [Twice, Early, Broken, Again, lambda: Backwards(nn.BatchNorm2d(3), nn.BatchNorm2d(3))]
)
def test_whatever_way_a_forward_takes_its_statistics_are_those_of_the_eager_model(
    build: Callable[[], nn.Module],
) -> None:
    """What layers show may leave graphs together or one by one: it is the same."""
    torch.manual_seed(0)
    model = build().eval()
    inputs = batches(1, 4, 2, 7, 1)
    eager = watch(model, model, inputs)
    compiled = copy.deepcopy(model)
    assert eager.samples == 15
    assert_same(watch(compiled, torch.compile(compiled, backend="eager"), inputs), eager)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parts", ["blocks", "layers", "within a try"])
def test_models_compiled_in_parts_are_seen_whole(parts: str) -> None:
    """The compiler then meets the monitor's own functions by themselves, and gives up on some after a few."""

    class Tried(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                try:
                    x = layer(x)
                    torch._dynamo.graph_break()
                except KeyError:  # noqa: PERF203 - that is what the compiler gives up on
                    pass
            return x

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)) for _ in range(12)]
    model = (Tried if parts == "within a try" else nn.Sequential)(*blocks).eval()
    inputs = batches(1, 4, 2, 7)
    eager = watch(model, model, inputs)
    if parts == "within a try":
        model.compile(backend="eager")
    for block in blocks if parts != "within a try" else ():
        (block if parts == "blocks" else block[1]).compile(backend="eager")
    with Monitor(model, values=None) as monitor, torch.inference_mode():
        for x in inputs:
            model(x)
        assert monitor.unobserved == {}
        assert_same(monitor.snapshot(), eager)


def test_a_graph_takes_and_gives_no_more_than_without_a_monitor() -> None:
    """But for the mark that its operators say they write to."""
    shown = []

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        del inputs
        (outputs,) = graph.graph.output_node().args
        assert isinstance(outputs, tuple)
        shown.append((len(outputs), len(graph.graph.find_nodes(op="placeholder"))))
        return graph.forward

    for monitored in (False, True):
        model = fuse(net())
        with Monitor(model) if monitored else nullcontext(), torch.inference_mode():
            torch.compile(model, fullgraph=True, backend=backend)(batches(2)[0])
        torch.compiler.reset()
    (plain, least), monitored_graph = shown
    assert monitored_graph == (plain, least + 1)


@pytest.mark.parametrize("inductor", ["known", "registers otherwise", "has other graphs"])
def test_what_inductor_writes_looks_without_the_dispatcher_where_that_can_be_had(
    inductor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an inductor that is not as it is known it looks by way of that, and sees the same."""
    model = net()
    if inductor != "known":
        from torch._inductor import lowering  # noqa: PLC0415 - it imports the compiler

        monkeypatch.delitem(lowering.lowerings, torch.ops.guardserve.look.default, raising=False)
        shorten = compiled._shorten.__wrapped__
        other = mock.Mock(wraps=lowering, V=mock.Mock(graph=object())) if inductor == "has other graphs" else object()
        monkeypatch.setattr(compiled, "_shorten", lambda _: shorten(other))
    looked = mock.Mock(side_effect=compiled._look_quickly)
    monkeypatch.setattr(torch.ops.guardserve.look, "quick", looked)
    inputs = batches(2, 2, 2)
    assert_same(watch(model, torch.compile(model), inputs), watch(model, model, inputs))
    assert looked.call_count == (9 if inductor == "known" else 0)


def test_a_graph_reads_for_no_monitor_but_those_of_now() -> None:
    """One that was closed sees no more, and one that came when there was a graph already sees all from then on."""
    model = fuse(net())
    (x,) = batches(2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        compiled(x)
        with Monitor(model) as first:
            compiled(x)
        compiled(x)
        with Monitor(model) as second, Monitor(model) as third:
            compiled(x)
        assert [monitor.snapshot().samples for monitor in (first, second, third)] == [2, 2, 2]


def test_compiled_cells_move_and_cover_every_position_equally() -> None:
    """Over a whole turn, the means are those of all positions."""
    model = net()
    (x,) = batches(2)
    with Monitor(model, values=None) as monitor, torch.inference_mode():
        model(x)
        exact = monitor.snapshot()
    compiled = torch.compile(model, fullgraph=True)
    with Monitor(model, values=1) as monitor, torch.inference_mode():
        compiled(x)
        first = monitor.snapshot().layers[0].mean_shift
        for _ in range(255):
            compiled(x)
        seen = monitor.snapshot()
    assert first != pytest.approx(exact.layers[0].mean_shift, rel=1e-3)
    for a, b in zip(seen.layers, exact.layers, strict=True):
        assert a.mean_shift == pytest.approx(b.mean_shift, rel=1e-4)
        assert a.log_std_ratio == pytest.approx(b.log_std_ratio, rel=1e-3, abs=1e-5)


def test_threads_share_a_compiled_model() -> None:
    """Four threads lose no sample and count none twice."""
    model = net()
    inputs = batches(*[1 + i % 3 for i in range(48)])
    with Monitor(model) as monitor:
        compiled: Any = torch.compile(model, fullgraph=True)
        guard = EvalGuard(compiled)
        for x in batches(1, 2, 3):
            guard(x)
        monitor.reset()
        threads = [threading.Thread(target=lambda i=i: [guard(x) for x in inputs[i::4]]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert monitor.snapshot().samples == sum(map(len, inputs))
        assert {layer.samples for layer in monitor.snapshot().layers} == {sum(map(len, inputs))}


def test_forwards_count_while_another_thread_compiles() -> None:
    """What tells that something is compiled tells it to every thread: it is not asked."""
    model = net()
    (x,) = batches(2)
    with (
        Monitor(model) as monitor,
        torch.inference_mode(),
        mock.patch.object(torch.compiler, "_is_compiling_flag", True),
    ):
        assert torch.compiler.is_compiling()
        model(x)
        assert monitor.snapshot().samples == 2


def test_layers_that_a_graph_lays_out_otherwise_get_other_slots() -> None:
    """After some forwards; until then, and where layouts come in turns, they are looked at in the slower way."""
    model = net()
    (x,) = batches(2)
    compiled = torch.compile(model, fullgraph=True)
    with Monitor(model) as monitor, torch.inference_mode():
        for _ in range(3):
            model(x)
        for _ in range(MOST_MISSES + 1):
            compiled(x)
        with mock.patch.object(_Tap, "read", side_effect=AssertionError):
            for _ in range(3):
                compiled(x)
        for _ in range(3):
            model(x)
            compiled(x)
        assert {layer.samples for layer in monitor.snapshot().layers} == {2 * (3 + MOST_MISSES + 1 + 3 + 6)}


class Mapped(nn.Module):
    """Has a part of it mapped over an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise twice."""
        y: torch.Tensor = torch.vmap(self.part)(self.first(x)[:, None]).squeeze(1)
        return y


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("outside", [False, True])
def test_what_is_mapped_in_a_graph_is_answered_and_shows_nothing(backend: str, outside: bool) -> None:
    """A part of the model, or the model in a larger graph."""
    model = nn.BatchNorm2d(3).eval() if outside else Mapped().eval()
    (x,) = batches(4)

    def called(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.vmap(model)(x[:, None]).squeeze(1) if outside else model(x)
        return y

    with torch.no_grad():
        expected = called(x)
        with Monitor(model) as monitor:
            torch.testing.assert_close(torch.compile(called, backend=backend)(x), expected)
            assert {layer.name: layer.samples for layer in monitor.snapshot().layers} == (
                {} if outside else {"first": 4}
            )


def test_looks_are_kept_where_their_layers_answers_are_not_used() -> None:
    """And gradients are those of a model without a monitor."""
    model, (x,) = net(), batches(3)
    twin = copy.deepcopy(model)

    def called(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model(x + 1)
        y: torch.Tensor = model(x)
        return y

    with Monitor(model) as monitor:
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.autograd.backward(torch.compile(called, backend="aot_eager", fullgraph=True)(model, left).square().sum())
        torch.autograd.backward(called(twin, right).square().sum())
        assert monitor.snapshot().samples == 6
    torch.testing.assert_close(left.grad, right.grad)
    torch.testing.assert_close(model.conv.weight.grad, twin.conv.weight.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_carries_no_monitor(strict: bool) -> None:
    """Exporting a monitored model leaves no operator of the monitor in the program."""
    model = net()
    with Monitor(model) as monitor:
        program = torch.export.export(model, (batches(2)[0],), strict=strict)
        assert not [node for node in program.graph.nodes if "guardserve" in str(node.target)]
        assert monitor.snapshot().samples == 0


def test_pictures_of_other_sizes_are_read_too() -> None:
    """Each size is a graph of its own, whole, also where sizes were to be symbols."""
    model = net()
    expected, seen = [], []
    for dynamic in (None, True):
        torch.compiler.reset()
        with Monitor(model) as monitor, torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
            for size in (8, 10, 12):
                compiled(torch.ones(2, 3, size, size))
                seen.append(monitor.snapshot().samples)
        expected += [2, 4, 6]
    assert seen == expected
