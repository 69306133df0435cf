"""What tells samples apart: hashes of what they bring into the model."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

Keys = npt.NDArray[np.uint64]


def sample_keys(inputs: Iterable[torch.Tensor], samples: int) -> Keys | None:
    """Hash each sample's rows of all inputs whose first axis counts samples; None if there is no such input.

    The same input has the same key in batches of any size, where what a model makes of it differs by rounding, and what
    is read of that by the positions that a forward reads.
    """
    hashes = [blake2b(digest_size=8) for _ in range(samples)]
    seen = False
    for tensor in inputs:
        if not tensor.ndim or len(tensor) != samples or not tensor.numel() or tensor.layout != torch.strided:
            continue
        rows = tensor.detach().cpu().reshape(samples, -1).contiguous().view(torch.uint8).numpy()
        seen = True
        for digest, row in zip(hashes, rows, strict=True):
            digest.update(row)
    return np.frombuffer(b"".join(digest.digest() for digest in hashes), np.uint64) if seen else None
