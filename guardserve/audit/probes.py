"""What was seen when a model ran on an example."""

from __future__ import annotations

from dataclasses import dataclass

from guardserve.audit.comparison import Difference
from guardserve.audit.fit import Fit
from guardserve.audit.flow import Flow
from guardserve.audit.workbench import Run
from guardserve.nonfinite import NonFinite
from guardserve.tracing import NonFiniteOrigin


class NotRunnableError(Exception):
    """A model cannot be probed, for the reason given."""


@dataclass(frozen=True)
class Dependence:
    """A sample whose output is another in another batch.

    Attributes:
        difference: The worst difference in its output.
        alone: Whether the other batch is the sample alone; else it has as many rows, and other mates.
        module: The innermost module whose output differs first; None when that could not be seen.
    """

    difference: Difference
    alone: bool
    module: str | None


@dataclass(frozen=True)
class BadOutput:
    """A non-finite output.

    Attributes:
        values: What is not finite.
        origin: Where it arose, if that was seen.
        by_design: Why it looks deliberate; None when it does not.
    """

    values: NonFinite
    origin: NonFiniteOrigin | None
    by_design: str | None


@dataclass(frozen=True)
class Probes:
    """What was seen when a model ran.

    Attributes:
        rows: Rows of the batches that were run.
        fixed: Whether the program takes no other number of rows.
        given: The whole example; None when its rows do not suit the program.
        alone: Its first row by itself; None likewise.
        batch: That row among others; None likewise.
        nonfinite: A non-finite output for the example.
        alone_nonfinite: A non-finite output for the row by itself that is finite among others.
        training: Modules that were in training mode at some point of a forward.
        unregistered: Layers that trained and are no submodules: the name of the module that called each, and its class.
        changed: Tensors and other attributes of modules that a forward changed.
        carried: How the answer to a request changes after another request; None when it does not.
        unsteady: How the answer differs from itself for the same model, input and seed; None when it does not.
        dependence: How a sample's output depends on its batch; a string says why that is not known.
        reduced: How an output of the batch as a whole changes with the rows in it; None when none does.
        uncompared: Why outputs were not compared.
        random: That the output is random, so that a sample alone could not be compared; None when it is not.
        fit: How well the running statistics fit the example; a string says why that is not known.
        flow: What comes before each normalisation; None when it was not seen.
    """

    rows: int
    fixed: bool
    given: Run | None
    alone: Run | None
    batch: Run | None
    nonfinite: BadOutput | None
    alone_nonfinite: NonFinite | None
    training: tuple[str, ...]
    unregistered: tuple[tuple[str, str], ...]
    changed: tuple[str, ...]
    carried: str | None
    unsteady: str | None
    dependence: Dependence | str | None
    reduced: Difference | None
    uncompared: tuple[str, ...]
    random: str | None
    fit: Fit | str
    flow: Flow | None
