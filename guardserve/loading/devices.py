"""The device that a model is put on."""

from __future__ import annotations

import re

import torch
from torch import nn

from guardserve.exceptions import ModelLoadError, SettingsError
from guardserve.loading.files import reason

_DEVICE = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")


def resolve_device(device: str) -> torch.device:
    """Turn a device setting into a device that is there.

    Args:
        device: ``auto`` (CUDA when there is any, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The device; a CUDA one always with its index, so that it equals the device of the tensors on it.

    Raises:
        SettingsError: The value is none of these, or names a CUDA device that is not there.
    """
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise SettingsError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise SettingsError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA device; use cpu, or auto to fall back on it"
        )
    index = int(match[1] or 0)
    if index >= count:
        raise SettingsError(f"device {device!r} does not exist: the CUDA devices here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device.

    Raises:
        ModelLoadError: It cannot be moved there.
    """
    try:
        return module.to(device)
    except Exception as error:
        raise ModelLoadError(f"the model cannot be moved to {device}: {reason(error)}") from error
