"""Which inputs have the batch axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from audit.models import noise, reasons
from torch import nn

from guardserve.audit import audit
from guardserve.audit.axes import settled
from guardserve.audit.examples import Example
from guardserve.audit.workbench import workbench


class Calling(nn.Module):
    """Calls a function of its inputs."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return self.function(*inputs)


X, CLASSES, SAME = noise(8, 3), noise(8, 3, seed=1), noise(3, 3)

CASES: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], set[int]]] = {
    "as many prototypes as rows": (lambda x, p: x @ p.T, (X, CLASSES), {0}),
    "a reference set": (lambda x, r: x - r.mean(0), (X, CLASSES), {0}),
    "weights of as many channels as rows": (lambda x, w: x * w, (noise(3, 3), noise(3, seed=1)), {0}),
    "a mask for each row": (lambda x, m: x * m, (X, CLASSES), {0, 1}),
    "a temperature beside one row": (lambda x, t: x / t, (X[:1], torch.full((1,), 2.0)), {0}),
    "prototypes beside one row": (lambda x, p: x @ p.T, (X[:1], CLASSES[:1]), {0}),
    "two of three": (lambda x, m, p: (x * m) @ p.T, (X, CLASSES, noise(8, 3, seed=2)), {0, 1}),
    "statistics of the batch": (lambda x, m: x * m - x.mean(0), (X, CLASSES), {0, 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_tells_which_inputs_are_rows(case: str) -> None:
    """An input as long as the batch may be one for all rows."""
    function, inputs, batched = CASES[case]
    with workbench(Calling(function)) as bench:
        assert settled(bench, Example.of(inputs, bench.model)).batched == batched


def test_an_input_for_all_rows_is_no_false_alarm() -> None:
    """Made-up prototypes would change every answer."""
    report = audit(Calling(lambda x, p: (x @ p.T).softmax(1)).eval(), (X, CLASSES))
    assert not report.reaches("warning")
    assert not reasons(report, "BN102")


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ((torch.ones(1), X), 8),
        ((X, torch.ones(10, 3)), 8),
        ((torch.ones(10, 3), X, CLASSES), 8),
        ((torch.ones(1), X[:1]), 1),
        ((torch.ones(()), X), 8),
    ],
)
def test_the_batch_is_the_commonest_length(inputs: Any, rows: int) -> None:
    """Whatever comes first."""
    assert Example.of(inputs, nn.Identity()).rows == rows
