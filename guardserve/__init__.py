"""Inference-serving safeguards for PyTorch models with BatchNorm."""

__version__ = "0.1.0"

import typing

from guardserve.exceptions import (
    ClientError,
    ClientTimeoutError,
    FusionError,
    GuardError,
    GuardserveError,
    InputError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteOutputError,
    OverloadedError,
    PickleRefusedError,
    ReferenceMismatchError,
    ReferenceProfileError,
    ResponseError,
    SettingsError,
    TrainingModeError,
    UnreachableError,
)
from guardserve.fusion import fuse, fusion_report
from guardserve.guard import EvalGuard, GuardWarning, NonFiniteOutputWarning
from guardserve.loading import example_input, image_preprocessing, load_model
from guardserve.monitor import Monitor, ReferenceProfile, ReferenceWarning
from guardserve.stats import Moments
from guardserve.tracing import trace_nonfinite

if typing.TYPE_CHECKING:
    from guardserve.client import AsyncClient, Client

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "ClientTimeoutError",
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
    "OverloadedError",
    "PickleRefusedError",
    "ReferenceMismatchError",
    "ReferenceProfile",
    "ReferenceProfileError",
    "ReferenceWarning",
    "ResponseError",
    "SettingsError",
    "TrainingModeError",
    "UnreachableError",
    "__version__",
    "example_input",
    "fuse",
    "fusion_report",
    "image_preprocessing",
    "load_model",
    "trace_nonfinite",
]


def __getattr__(name: str) -> object:
    """Import the clients when they are asked for: the rest of the package needs no HTTP."""
    if name in {"AsyncClient", "Client"}:
        from guardserve import client  # noqa: PLC0415

        found: object = getattr(client, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
