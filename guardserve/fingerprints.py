"""What tells one version of a model from another."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import nn

BYTES = 6


def fingerprint(module: nn.Module) -> str:
    """Return a short hash of a model's weights, buffers and structure, in hexadecimal digits.

    Two processes that load the same files give the same; training flags and the device make no difference. Weights
    that are not plain tensors, as those of quantised programs, count with their names only.

    >>> layer = nn.BatchNorm1d(1)
    >>> before = fingerprint(layer)
    >>> before == fingerprint(layer.eval())
    True
    >>> _ = layer.running_mean.fill_(3)
    >>> before == fingerprint(layer)
    False
    """
    digest = hashlib.blake2b(_structure(module).encode(), digest_size=BYTES)
    for name, value in module.state_dict().items():
        digest.update(f"\n{name} ".encode())
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _structure(module: nn.Module) -> str:
    """Return a program's code, or how modules of Python are put together, wherever in memory."""
    code = getattr(module, "code", None)
    return code if isinstance(code, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(module))
