"""A request on its way through the engine, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from guardserve.exceptions import GuardserveError, NonFiniteOutputError
from guardserve.identity import current

State: TypeAlias = Literal["new", "queued", "running", "done", "dropped"]


class QueueFullError(GuardserveError):
    """As many requests as may wait are waiting."""


class ForwardTimeoutError(GuardserveError):
    """The forward took longer than it may; it may still be running, and nobody waits for it."""


class OutOfMemoryError(GuardserveError):
    """The device's memory did not suffice, not even for half of the batch."""


class DeviceError(GuardserveError):
    """The device reported an error of its own, after which it may answer nothing any more."""


class Result(NamedTuple):
    """What came of a request.

    Attributes:
        outputs: Its rows of every output by name, on the CPU; empty when it failed.
        nonfinite: For each output with NaN or infinity, what and where; only of a request that allows them.
        p_values: How odd the monitor finds each row; None when nobody has asked, or it cannot tell.
        error: Why it failed.
    """

    outputs: Mapping[str, torch.Tensor]
    nonfinite: Sequence[NonFiniteOutputError] = ()
    p_values: Sequence[float] | None = None
    error: BaseException | None = None

    @classmethod
    def failed(cls, error: BaseException) -> Result:
        """Return the result of a request that failed."""
        return cls({}, error=error)


class Job:
    """One request: ``new``, ``queued``, ``running``, ``done``; or ``dropped`` instead of ``running``.

    The queue and the engine move it on; it never goes back.

    Args:
        inputs: One tensor for each input of the model, in order, batch first, on the CPU.
        allow_nonfinite: Whether outputs with NaN or infinity are its answer rather than its failure.
        score: Whether the monitor is to say how odd it finds each row.

    Attributes:
        rows: Number of its samples.
        shape: What the inputs of two requests must have in common to share a forward.
        queued_at: When it was queued, by the monotonic clock.
        began_at: When its batch was taken.
        result: What came of it, once it is done.
        identity: Whose request it is: what was current when it was made.
    """

    __slots__ = (
        "allow_nonfinite",
        "began_at",
        "identity",
        "inputs",
        "queued_at",
        "result",
        "rows",
        "score",
        "shape",
        "state",
    )

    def __init__(self, inputs: Sequence[torch.Tensor], *, allow_nonfinite: bool = False, score: bool = False) -> None:
        self.inputs = inputs
        self.score = score
        self.allow_nonfinite = allow_nonfinite
        self.rows: int = inputs[0].shape[0]
        self.shape = tuple([(tensor.dtype, tensor.shape[1:]) for tensor in inputs])
        self.state: State = "new"
        self.queued_at = self.began_at = 0.0
        self.result: Result | None = None
        self.identity = current()

    def finish(self, result: Result) -> None:
        """Take the result, and let go of the inputs."""
        self.result = result
        self.state = "done"
        self.inputs = ()
