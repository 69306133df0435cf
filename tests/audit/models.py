"""Small sound models, built in different ways, into which the tests put hazards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from guardserve.audit import Finding, Report

Build = Callable[[], tuple[nn.Module, Any]]
"""Builds a sound model in eval mode, and an example of eight rows for it."""


class Residual(nn.Module):
    """Convolutions with a shortcut, in containers of modules, with functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleDict({"first": nn.BatchNorm2d(6), "second": nn.BatchNorm2d(6)})
        self.head = nn.Linear(6, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits, shape ``(N, 4)``."""
        x = self.stem(image)
        for conv, norm in zip(self.convs, self.norms.values(), strict=True):
            x = x + F.relu(norm(conv(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Tabular(nn.Module):
    """Numbers and categories, of which it returns several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.numbers = nn.Linear(5, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.GELU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, category: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits, shape ``(N, 2)``, their larger one, shape ``(N,)``, and its index."""
        y = self.body(self.norm(self.numbers(x) + self.embedding(category)))
        logits = self.head(y)
        return {"logits": logits, "score": logits.amax(1), "label": logits.argmax(1)}


class Sequence(nn.Module):
    """A recurrent layer over tokens, normalised over time, whose code depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.norm = nn.BatchNorm1d(6)
        self.recurrent = nn.GRU(6, 5, batch_first=True)
        self.out = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, shape ``(N, 3)``, and the last state, shape ``(1, N, 5)``."""
        if int(tokens.max()) > 12:
            raise ValueError("unknown token")
        x = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        y, state = self.recurrent(x)
        return self.out(y[:, -1]), state


def convolutional() -> tuple[nn.Module, Any]:
    """Build a plain stack of layers."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 4),
    )
    return settled(model, noise(8, 3, 12, 12))


def residual() -> tuple[nn.Module, Any]:
    """Build a model with shortcuts."""
    return settled(Residual(), noise(8, 3, 12, 12))


def tabular() -> tuple[nn.Module, Any]:
    """Build a model of two inputs and three outputs."""
    return settled(Tabular(), (noise(8, 5), torch.arange(8)))


def sequence() -> tuple[nn.Module, Any]:
    """Build a recurrent model of tokens."""
    return settled(Sequence(), torch.arange(8 * 7).reshape(8, 7) % 13)


BUILDS: tuple[Build, ...] = (convolutional, residual, tabular, sequence)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settled(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """Give a model reproducible weights and the statistics of its example, and put it in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    layers = norms(model)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # the statistics are exactly those of the one batch then
        layer.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(*example) if isinstance(example, tuple) else model(example)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return model.eval(), example


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def norm_names(model: nn.Module) -> list[str]:
    """Return their names."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def hits(report: Report, code: str) -> list[Finding]:
    """Return the findings of one rule."""
    return [finding for finding in report.findings if finding.code == code]


def codes(report: Report) -> set[str]:
    """Return the codes of all findings."""
    return {finding.code for finding in report.findings}


def reasons(report: Report, code: str) -> list[str]:
    """Return why a rule was not checked."""
    return [skip.reason for skip in report.skipped if skip.code == code]


class ToTheLongest(nn.Module):
    """Averages embeddings over as many places as the longest row of the batch has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Average."""
        longest = int((x > 0).sum(1).max().clamp(min=1))
        y: torch.Tensor = self.embedding(x[:, :longest]).mean(1)
        return y
