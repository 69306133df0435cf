"""The demo's model: a small convolutional network for 8x8 handwritten digits, with its trained weights."""

from __future__ import annotations

from collections import OrderedDict
from importlib import resources

import safetensors.torch
import torch
from torch import nn

from guardserve.loading import example_input

WEIGHTS = "digits_cnn.safetensors"
"""Name of the packaged weights, beside this module; ``guardserve.demo.train`` writes them."""


class DigitsCNN(nn.Module):
    """Five conv-BatchNorm-ReLU blocks (208 normalised channels), a global mean and a linear head.

    Input: greyscale digits of shape ``(N, 1, 8, 8)``, black 0 to white 1. Output: logits of shape ``(N, 10)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _block(1, 16),
            _block(16, 32),
            _block(32, 32, stride=2),
            _block(32, 64),
            _block(64, 64, stride=2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of digits."""
        features: torch.Tensor = self.blocks(image).mean(dim=(2, 3))
        logits: torch.Tensor = self.head(features)
        return logits


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


@example_input(image=torch.zeros(1, 1, 8, 8))
def digits_cnn() -> DigitsCNN:
    """Build the model with its trained weights, **in training mode**.

    That is how ``nn.Module`` starts and what a factory returns when its author forgets ``.eval()``: served as
    it is, the model would normalise by each request's own statistics. The guard is there to prevent that.
    """
    model = DigitsCNN()
    weights = resources.files(__package__).joinpath(WEIGHTS).read_bytes()
    model.load_state_dict(safetensors.torch.load(weights))
    return model
