"""What a model takes and gives: named tensors with a dtype and a shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

DATATYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "UINT8": torch.uint8,
        "UINT16": torch.uint16,
        "UINT32": torch.uint32,
        "UINT64": torch.uint64,
        "INT8": torch.int8,
        "INT16": torch.int16,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "FP16": torch.float16,
        "FP32": torch.float32,
        "FP64": torch.float64,
        "BF16": torch.bfloat16,
    }
)
"""Every datatype that can be served, by its name in the Open Inference Protocol V2."""


@dataclass(frozen=True)
class TensorSpec:
    """One named input or output of a model.

    Attributes:
        name: Name by which requests and responses refer to the tensor.
        dtype: Element type.
        shape: Sizes **including** the batch dimension, which comes first; -1 stands for any size.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def example(self, batch_size: int = 1, free_size: int = 1, *, varied: bool = False) -> torch.Tensor:
        """Make a deterministic tensor that fits this spec: normal noise for floats, zeros otherwise.

        A free batch dimension becomes ``batch_size``; any other free dimension becomes ``free_size``.

        Args:
            batch_size: Rows, if their number is free.
            free_size: Any other size that is free.
            varied: Whether other types than floats get ones, and zeros behind them, in rows of different lengths.
        """
        sizes = [free_size if size == -1 else size for size in self.shape]
        if self.shape and self.shape[0] == -1:
            sizes[0] = batch_size
        generator = torch.Generator().manual_seed(0)
        if self.dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).to(self.dtype)
        example = torch.zeros(sizes, dtype=self.dtype)
        if varied and example.numel():
            rows = example.view(sizes[0], -1) if sizes else example.view(1, 1)
            for number, row in enumerate(rows, 1):
                row[: math.ceil(len(row) * number / len(rows))] = 1
        return example


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in the order in which its forward takes and returns them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
