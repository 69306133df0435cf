from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch

from guardserve.observation.reading import Rows

_Array: TypeAlias = npt.NDArray[np.float64]

@final
class Cells:
    def __init__(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        samples: int,
        outer: int,
        strips: bytes,
        length: int,
        step: int,
        axes: bytes,
        rowed: int,
        positions: int,
        turning: int,
        row: int,
        hop: int,
        behind: int,
    ) -> None: ...

@final
class Slot:
    def __init__(self, cells: Cells, anchor: int, mean: int, variance: int, row: int, memory: object) -> None: ...
    @property
    def turn(self) -> int: ...
    def take(self, x: torch.Tensor, turn: int, /) -> bool: ...

@final
class Glance:
    def __init__(self, owner: object, index: int, ranks: tuple[int, ...] = ...) -> None: ...
    def at(self, x: torch.Tensor, /) -> bool: ...

def add_up(rows: list[Rows], constants: _Array, moments: _Array, /) -> bool: ...
def merge_moments(
    a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], both: tuple[torch.Tensor, ...], /
) -> bool: ...
def begin(owner: object, record: object, slots: list[Slot | None], turn: int, timed: bool, /) -> None: ...
def end(owner: object, /) -> tuple[int, float]: ...
def bit_sum(x: object, /) -> int | None: ...
def is_finite(x: object, /) -> bool | None: ...
def is_training(attributes: list[Any], /) -> bool: ...
def hold_only(dicts: list[dict[str, Any]], values: tuple[Any, ...], /) -> bool: ...
