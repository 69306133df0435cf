"""Inference-serving safeguards for PyTorch models with BatchNorm."""

__version__ = "0.1.0"
