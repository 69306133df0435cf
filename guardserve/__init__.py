"""Inference-serving safeguards for PyTorch models with BatchNorm."""

__version__ = "0.1.0"

from guardserve.exceptions import (
    FusionError,
    GuardError,
    GuardserveError,
    InputError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteOutputError,
    PickleRefusedError,
    ReferenceMismatchError,
    ReferenceProfileError,
    SettingsError,
    TrainingModeError,
)
from guardserve.fusion import fuse, fusion_report
from guardserve.guard import EvalGuard, GuardWarning, NonFiniteOutputWarning
from guardserve.loading import example_input, load_model
from guardserve.monitor import Monitor, ReferenceProfile, ReferenceWarning
from guardserve.stats import Moments
from guardserve.tracing import trace_nonfinite

__all__ = [
    "EvalGuard",
    "FusionError",
    "GuardError",
    "GuardWarning",
    "GuardserveError",
    "InputError",
    "MissingExtraError",
    "ModelLoadError",
    "Moments",
    "Monitor",
    "NonFiniteOutputError",
    "NonFiniteOutputWarning",
    "PickleRefusedError",
    "ReferenceMismatchError",
    "ReferenceProfile",
    "ReferenceProfileError",
    "ReferenceWarning",
    "SettingsError",
    "TrainingModeError",
    "__version__",
    "example_input",
    "fuse",
    "fusion_report",
    "load_model",
    "trace_nonfinite",
]
