"""Monitoring a program from ``torch.export``: the statistics of the eager model, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from guardserve import EvalGuard, Monitor, ReferenceProfile
from guardserve.graphs import graph_norms
from guardserve.monitor import Snapshot

SIZES = (1, 4, 2, 7)


class Net(nn.Module):
    """A net that runs one of its layers twice, has one without affine parameters and one called on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.twice = nn.BatchNorm2d(8, eps=1e-3)
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features, shape ``(N, 4)``."""
        x = self.twice(torch.relu(self.twice(self.stem(x))))
        y: torch.Tensor = self.head(self.bare(x).mean((2, 3)))
        return y


@pytest.fixture
def model() -> Net:
    """Return a net whose running statistics are not the defaults."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 10, 10))
    return net.eval()


def batches() -> list[torch.Tensor]:
    """Return inputs of several batch sizes."""
    return [torch.randn(size, 3, 10, 10, generator=torch.Generator().manual_seed(size)) for size in SIZES]


def exported(model: nn.Module, *, core: bool = False) -> nn.Module:
    """Export for any batch size; with ``core`` decompose to the core operators, which have another batch norm."""
    example = (torch.randn(3, 3, 10, 10),)
    program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    return (program.run_decompositions() if core else program).module()


def watch(module: nn.Module) -> Snapshot:
    """Return what a monitor sees."""
    with Monitor(module) as monitor, torch.inference_mode():
        for x in batches():
            module(x)
        return monitor.snapshot()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("core", [False, True])
def test_an_exported_program_shows_the_statistics_of_the_eager_model(model: Net, core: bool) -> None:
    """Each layer has its name, as many samples and the same effect sizes to rounding."""
    eager, program = watch(model), watch(exported(model, core=core))
    assert program.samples == eager.samples == sum(SIZES)
    assert {layer.name for layer in program.layers} == {"stem.1", "twice", "bare", "head.1"}
    expected = {layer.name: layer for layer in eager.layers}
    for layer in program.layers:
        assert layer.samples == expected[layer.name].samples
        assert layer.wasserstein2 == pytest.approx(expected[layer.name].wasserstein2, rel=1e-5)
        assert layer.log_std_ratio == pytest.approx(expected[layer.name].log_std_ratio, rel=1e-4)
        assert [c.channel for c in layer.worst_channels] == [c.channel for c in expected[layer.name].worst_channels]
    assert program.unobserved == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_loaded_program_is_watched_under_the_guard_and_left_as_it_was(model: Net, tmp_path: Path) -> None:
    """From a .pt2 file; afterwards graph, modules, weights and answers are those of before."""
    program = torch.export.export(model, (torch.randn(2, 3, 10, 10),))
    torch.export.save(program, tmp_path / "net.pt2")
    module = torch.export.load(tmp_path / "net.pt2").module()
    assert isinstance(module, fx.GraphModule)
    x = batches()[2]
    before = (module.code, [name for name, _ in module.named_modules()], list(module.state_dict()), module(x))
    with Monitor(module) as monitor:
        assert torch.equal(EvalGuard(module)(x), before[3])
        assert monitor.snapshot().samples == 2
        assert list(module.state_dict()) == before[2]
        twin = copy.deepcopy(module)
        twin(x)
        assert monitor.snapshot().samples == 2
    assert (module.code, [name for name, _ in module.named_modules()], list(module.state_dict())) == before[:3]
    assert torch.equal(module(x), before[3])
    assert len(list(graph_norms(module))) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_profile_of_the_eager_model_judges_the_program(model: Net) -> None:
    """Names and fingerprints are the same, so the same samples get the same p-values."""
    torch.manual_seed(1)
    profile = ReferenceProfile.fit(model, torch.split(torch.randn(300, 3, 10, 10), 50), target_arl=200)
    x, scores = torch.randn(16, 3, 10, 10), []
    for module in (model, exported(model)):
        with Monitor(module, reference=profile, target_arl=200) as monitor, torch.inference_mode():
            module(x)
            scores.append(monitor.scores())
    assert scores[0] == pytest.approx(scores[1], abs=3 / profile.samples)


def test_a_symbolically_traced_model_is_watched(model: Net) -> None:
    """A torch.fx module keeps its layers, which are watched as such, once."""
    traced = fx.symbolic_trace(model)
    assert {layer.name: layer.samples for layer in watch(traced).layers}["twice"] == 2 * sum(SIZES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_said_to_be_unobserved(model: Net) -> None:
    """With the remedy."""
    scripted = torch.jit.trace(model, torch.randn(2, 3, 10, 10))  # type: ignore[no-untyped-call]
    with Monitor(scripted) as monitor:
        assert monitor.layers == ()
        assert "torch.export" in monitor.unobserved["stem.1"]
