"""A pytest plugin: two fixtures and a marker that keep a model safe to serve.

It is there as soon as guardserve is installed. The whole check of a model is one line::

    @pytest.mark.guardserve("shop.models:resnet")
    def test_resnet_is_safe_to_serve(): ...

and in a test of one's own::

    def test_my_model(assert_batch_invariant, assert_no_hazards):
        assert_no_hazards(model.eval(), example)
        assert_batch_invariant(model, example, sizes=(1, 2, 7))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

MARKER = (
    "guardserve(model, example=None, sizes=(1, 2, 7)): before the test runs, audit a model and compare its outputs in "
    "batches of several sizes. The model is package.module:factory, a module, or (as model=) a function that returns "
    "one; the example may come from the factory's @guardserve.example_input."
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", MARKER)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Check the models that a test is marked with."""
    for marker in item.iter_markers("guardserve"):
        _check(*marker.args, **marker.kwargs)


@pytest.fixture
def assert_no_hazards() -> Callable[..., None]:
    """Return a function ``(model, example=None, *, ignore=())`` that fails on any error that the audit finds."""
    return no_hazards


@pytest.fixture
def assert_batch_invariant() -> Callable[..., None]:
    """Return a function ``(model, example, sizes=(1, 2, 7), rtol=None)`` that fails if batch mates or sizes matter."""
    return batch_invariant


def no_hazards(model: nn.Module, example: Any = None, *, ignore: Sequence[str] = ()) -> None:
    """Fail on any error-level finding of :func:`guardserve.audit.audit`.

    Args:
        model: The model, in the mode in which it is to be served.
        example: An example input, batch first; without one the rules that need a forward are not checked.
        ignore: Codes of rules to leave out.
    """
    __tracebackhide__ = True
    from guardserve.audit import audit  # noqa: PLC0415 - every pytest run loads the plugin, few need the audit

    report = audit(model, example, ignore=ignore)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        lines = [
            f"{finding.code} {finding.module or 'the model itself'}: {finding.message}\n    {finding.remedy}"
            for finding in errors
        ]
        pytest.fail("\n".join([f"the model is not safe to serve: {report.verdict}", *lines]), pytrace=False)


def batch_invariant(
    model: nn.Module, example: Any, sizes: Sequence[int] = (1, 2, 7), rtol: float | None = None
) -> None:
    """Fail unless each sample's output is the same in batches of all sizes; see :func:`batch_variance`."""
    __tracebackhide__ = True
    from guardserve.audit.invariance import batch_variance  # noqa: PLC0415 - as above

    variance = batch_variance(model, example, sizes, rtol)
    if variance is not None:
        pytest.fail(f"the model's answer depends on the batch: {variance}", pytrace=False)


def _check(model: Any, example: Any = None, sizes: Sequence[int] = (1, 2, 7)) -> None:
    __tracebackhide__ = True
    from torch import nn  # noqa: PLC0415 - as above

    from guardserve.loading import load_model  # noqa: PLC0415

    if isinstance(model, str):
        loaded = load_model(model, device="cpu")
        model = loaded.module
        example = {spec.name: spec.example(max(sizes)) for spec in loaded.inputs} if example is None else example
    elif not isinstance(model, nn.Module):
        example = getattr(model, "example_input", None) if example is None else example
        model = model()
    if example is None:
        pytest.fail("the guardserve marker needs an example: give it one, or declare the factory's", pytrace=False)
    no_hazards(model, example)
    batch_invariant(model, example, sizes)
