"""The engine: runs requests through one model in batches, bounded in number and in time, and knows no HTTP."""

from guardserve.engine.engine import FAULTS, Engine, EngineCounts
from guardserve.engine.job import (
    DeviceError,
    ForwardTimeoutError,
    Job,
    OutOfMemoryError,
    QueueFullError,
    Result,
)

__all__ = [
    "FAULTS",
    "DeviceError",
    "Engine",
    "EngineCounts",
    "ForwardTimeoutError",
    "Job",
    "OutOfMemoryError",
    "QueueFullError",
    "Result",
]
