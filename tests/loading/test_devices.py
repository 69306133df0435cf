"""Tests of guardserve.loading.devices."""

from __future__ import annotations

import pytest
import torch

from guardserve.exceptions import SettingsError
from guardserve.loading import resolve_device


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make torch report a number of CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize("cuda_devices", [0, 2], indirect=True)
@pytest.mark.usefixtures("cuda_devices")
def test_the_cpu_is_there_with_and_without_cuda() -> None:
    """The device cpu never depends on CUDA."""
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda_devices", "expected"), [(0, "cpu"), (1, "cuda:0"), (2, "cuda:0")], indirect=["cuda_devices"]
)
@pytest.mark.usefixtures("cuda_devices")
def test_auto_takes_cuda_when_there_is_any(expected: str) -> None:
    """The device auto is the first CUDA device, or the CPU where there is none."""
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("cuda_devices", [2], indirect=True)
@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")])
@pytest.mark.usefixtures("cuda_devices")
def test_a_cuda_device_always_has_its_index(device: str, expected: str) -> None:
    """It equals the device of a tensor on it, which has one."""
    assert str(resolve_device(device)) == expected


@pytest.mark.parametrize("cuda_devices", [0], indirect=True)
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.usefixtures("cuda_devices")
def test_cuda_that_is_not_there_is_refused(device: str) -> None:
    """The error names the value, the torch that sees no CUDA, and the remedy."""
    with pytest.raises(SettingsError, match=rf"'{device}': torch .* sees no CUDA device; use cpu, or auto"):
        resolve_device(device)


@pytest.mark.parametrize("cuda_devices", [2], indirect=True)
@pytest.mark.usefixtures("cuda_devices")
def test_an_index_out_of_range_is_refused() -> None:
    """The error names the devices that are there."""
    with pytest.raises(SettingsError, match="'cuda:2' does not exist: the CUDA devices here are cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "cuda:0\n", "cuda:99999"])
def test_anything_else_is_refused(device: str) -> None:
    """The error lists the values that can be used."""
    with pytest.raises(SettingsError, match="use auto, cpu, cuda or cuda:N"):
        resolve_device(device)
