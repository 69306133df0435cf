"""Fusing BatchNorm layers into the convolutions and linear layers that they follow."""

from guardserve.fusion.agreement import Example
from guardserve.fusion.model import FusionReport, check_fused, fuse, fusion_report

__all__ = ["Example", "FusionReport", "check_fused", "fuse", "fusion_report"]
