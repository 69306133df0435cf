"""The models and the hand-written peers of ``benchmarks/serving.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from resnet import resnet18
from torch import nn

from guardserve import example_input

SHAPES = {"tiny": (1, 28, 28), "resnet": (3, 224, 224)}


class Named(nn.Module):
    """A model whose input is called ``x``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the body."""
        y: torch.Tensor = self.body(x)
        return y


@example_input(x=torch.zeros(1, *SHAPES["tiny"]))
def tiny() -> nn.Module:
    """Build a CNN of three convolutions with BatchNorm: its forward costs less than a web framework."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return Named(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))).eval()


@example_input(x=torch.zeros(1, *SHAPES["resnet"]))
def resnet() -> nn.Module:
    """Build ResNet-18."""
    torch.manual_seed(0)
    return Named(resnet18()).eval()


class Item(BaseModel):
    """A request as one writes it by hand."""

    data: list[Any]


def _plain(model: nn.Module, shape: tuple[int, ...]) -> FastAPI:
    """Serve a model as one does by hand: no safeguard, no batching, no validation."""
    app = FastAPI()

    @app.get("/ready")
    def ready() -> str:
        return "ok"

    @app.post("/json")
    async def as_json(item: Item) -> dict[str, Any]:
        with torch.inference_mode():
            return {"output": model(torch.tensor(item.data, dtype=torch.float32)).tolist()}

    @app.post("/raw")
    async def as_bytes(request: Request) -> Response:
        x = torch.from_numpy(np.frombuffer(bytearray(await request.body()), np.float32).reshape(1, *shape))
        with torch.inference_mode():
            return Response(model(x).numpy().tobytes(), media_type="application/octet-stream")

    return app


def plain_tiny() -> FastAPI:
    """Serve the small CNN by hand."""
    torch.set_num_threads(1)
    return _plain(tiny(), SHAPES["tiny"])


def plain_resnet() -> FastAPI:
    """Serve ResNet-18 by hand."""
    torch.set_num_threads(1)
    return _plain(resnet(), SHAPES["resnet"])
