"""The errors that guardserve raises.

Every one of them names what was wrong (the module, the field, the value seen) and the remedy::

    GuardserveError
    ├── SettingsError              a setting or command-line value
    ├── MissingExtraError          an optional dependency (also an ImportError)
    ├── ModelLoadError             a model could not be loaded
    │   └── PickleRefusedError     loading it would run pickled code
    ├── FusionError                a model cannot be fused, or its fused copy does not answer as it does
    ├── ReferenceProfileError      a reference profile could not be made or read
    │   ├── ReferenceMismatchError it belongs to another model
    │   └── DetectorStateError     what a detector remembered does not fit its profile, or is damaged
    ├── ModelOutputError           what the model returned cannot be served
    ├── InputError                 an inference request's tensors do not fit the model (also a ValueError)
    ├── ClientError                a client did not get what it asked for
    │   ├── ResponseError          the server's answer was an error
    │   │   └── OverloadedError    as it could not take more
    │   └── UnreachableError       there was no answer
    │       └── ClientTimeoutError in time (also a TimeoutError)
    └── GuardError                 a safeguard stopped an inference
        ├── NonFiniteOutputError   an output holds NaN or infinity
        └── TrainingModeError      eval mode does not keep the model from using or moving batch statistics
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guardserve.nonfinite import NonFinite


class GuardserveError(Exception):
    """Base of every error raised by guardserve."""


class SettingsError(GuardserveError):
    """A setting has a value that cannot be used."""


class MissingExtraError(GuardserveError, ImportError):
    """An optional dependency is not installed.

    Args:
        feature: What was asked for, as the user would call it.
        extra: The extra of the distribution that brings it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs the "{extra}" extra: pip install "guardserve[{extra}]"')
        self.feature = feature
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Pickle by the constructor's arguments, for process pools."""
        return type(self), (self.feature, self.extra)


class ModelLoadError(GuardserveError):
    """A model could not be loaded from what the user named."""


class PickleRefusedError(ModelLoadError):
    """Loading the file would run code from a pickle, which was not allowed."""


class FusionError(GuardserveError):
    """A model cannot be copied to be fused, or its fused copy does not answer as the model does."""


class ReferenceProfileError(GuardserveError):
    """A reference profile could not be made from the data, or read from a file."""


class ReferenceMismatchError(ReferenceProfileError):
    """A reference profile belongs to another model, or to the same one before its statistics changed."""


class DetectorStateError(ReferenceProfileError):
    """What a detector remembered belongs to another reference profile, or is damaged."""


class ModelOutputError(GuardserveError):
    """What the model returned cannot be served: no tensors, of no servable type, or not one row for each sample."""


class InputError(GuardserveError, ValueError):
    """The tensors of an inference request do not fit the model's signature."""


class ClientError(GuardserveError):
    """A client did not get what it asked for."""


class ResponseError(ClientError):
    """The server's answer was an error.

    Attributes:
        status: HTTP status.
        message: What the server said.
    """

    def __init__(self, status: int, message: str, *rest: object) -> None:
        super().__init__(status, message, *rest)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} (HTTP {self.status})"


class OverloadedError(ResponseError):
    """The server could not take more, or its model is not ready.

    Attributes:
        retry_after: Seconds after which it wants to be asked again, if it said so.
    """

    def __init__(self, status: int, message: str, retry_after: float | None) -> None:
        super().__init__(status, message, retry_after)
        self.retry_after = retry_after


class UnreachableError(ClientError):
    """The server gave no answer."""


class ClientTimeoutError(UnreachableError, TimeoutError):
    """The server gave no answer in time."""


class GuardError(GuardserveError):
    """A safeguard stopped an inference."""


class NonFiniteOutputError(GuardError):
    """A model output holds NaN or infinity.

    Attributes:
        output: Path of the first bad output, such as ``output`` or ``output['logits']``.
        count: Number of non-finite values in that output.
        total: Number of values in that output.
        rows: Indices along its first axis that hold one.
        module: Qualified name of the first module whose output was non-finite although its inputs
            were finite, or None when it was not found.
    """

    def __init__(self, message: str, bad: NonFinite, module: str | None = None) -> None:
        super().__init__(message)
        self._bad = bad
        self.output = bad.path
        self.count = bad.count
        self.total = bad.total
        self.rows = bad.rows
        self.module = module

    def __reduce__(self) -> tuple[type[NonFiniteOutputError], tuple[str, NonFinite, str | None]]:
        """Pickle by the constructor's arguments, for process pools."""
        return type(self), (str(self), self._bad, self.module)


class TrainingModeError(GuardError):
    """The model uses its batch's statistics, or moves its running ones, although it is in eval mode."""
