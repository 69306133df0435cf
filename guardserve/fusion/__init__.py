"""Fusing BatchNorm layers into the convolutions and linear layers that they follow."""

from guardserve.fusion.agreement import Example
from guardserve.fusion.model import FusionReport, fuse, fusion_report

__all__ = ["Example", "FusionReport", "fuse", "fusion_report"]
