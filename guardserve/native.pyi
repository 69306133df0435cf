from typing import final

import torch

@final
class Slot:
    starts: bytes
    def __init__(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        starts: bytes,
        strips: bytes,
        length: int,
        step: int,
        apart: int,
        samples: int,
        anchor: int,
        channels: int,
        mean: int,
        variance: int,
        row: int,
        memory: object,
    ) -> None: ...
    @property
    def turn(self) -> int: ...
    def take(self, x: torch.Tensor, turn: int, /) -> bool: ...

def is_finite(x: object, /) -> bool | None: ...
