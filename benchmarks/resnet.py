"""ResNet-18 and ResNet-50 (He et al. 2015, arXiv:1512.03385) with random weights, for timing."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1 with four times the outputs."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in shapes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the body's output to the input."""
        y: torch.Tensor = self.body(x)
        return torch.relu_(y + self.down(x))


class ResNet(nn.Module):
    """A residual network for 224x224 images and 1,000 classes."""

    def __init__(self, blocks: tuple[int, int, int, int], *, bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        layers: list[nn.Module] = []
        inputs = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(Block(inputs, width, stride, bottleneck=bottleneck))
                inputs = width * 4 if bottleneck else width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits, shape ``(N, 1000)``."""
        logits: torch.Tensor = self.head(self.stages(self.stem(image)).mean((2, 3)))
        return logits


def resnet18() -> ResNet:
    """Build ResNet-18: 20 BatchNorm layers."""
    return ResNet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> ResNet:
    """Build ResNet-50: 53 BatchNorm layers."""
    return ResNet((3, 4, 6, 3), bottleneck=True)
