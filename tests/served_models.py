"""Small models that several tests serve."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """One BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        y: torch.Tensor = self.bn(x)
        return y


class Two(nn.Module):
    """Two outputs, of which one divides by the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalise, and take the inverse."""
        return {"normal": self.bn(x), "inverse": 1 / x[:, :1]}


class Echo(nn.Module):
    """Gives back what it takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Copy."""
        return x.clone()
