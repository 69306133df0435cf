"""What tells samples apart: hashes of what they bring into the model."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

Keys = npt.NDArray[np.uint64]


def sample_keys(inputs: Iterable[torch.Tensor], samples: int) -> Keys | None:
    """Hash what each sample brings: its rows of inputs whose first axis counts samples, and all of the other inputs.

    The same input has the same key in batches of any size, where what a model makes of it differs by rounding, and what
    is read of that by the positions that a forward reads. None if no input counts samples, or one is no plain memory.
    """
    hashes = [blake2b(digest_size=8) for _ in range(samples)]
    seen = False
    for tensor in inputs:
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
            return None
        if not tensor.numel():
            continue
        counts = tensor.ndim > 0 and len(tensor) == samples
        values = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(samples if counts else 1, -1).contiguous()
        rows = values.view(torch.uint8).numpy()
        for number, digest in enumerate(hashes):
            digest.update(rows[number if counts else 0])
        seen |= counts
    return np.frombuffer(b"".join(digest.digest() for digest in hashes), np.uint64) if seen else None
