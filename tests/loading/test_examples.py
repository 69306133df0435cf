"""Tests of guardserve.loading.examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from guardserve.exceptions import ModelLoadError
from guardserve.loading import example_input
from guardserve.loading.examples import find_example


def test_the_decorator_returns_what_it_was_given() -> None:
    """A factory stays the function that it was, and a class the class."""

    def factory() -> nn.Module:
        return nn.Identity()

    assert example_input(torch.zeros(1, 3))(factory) is factory

    @example_input(torch.zeros(1, 3))
    class Model(nn.Identity):
        pass

    assert isinstance(Model(), nn.Identity)


def test_tensors_are_kept_by_position_or_by_name() -> None:
    """The attribute holds a tuple for positional tensors and a dict for named ones."""
    x = torch.zeros(1, 3)

    @example_input(x)
    def by_position() -> None: ...

    @example_input(image=x)
    def by_name() -> None: ...

    assert find_example(by_position) == (x,)
    assert find_example(by_name) == {"image": x}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [((), {}), ((torch.zeros(1),), {"x": torch.zeros(1)}), (([1.0],), {}), ((), {"x": None})],
    ids=["none", "both", "list", "named None"],
)
def test_the_decorator_refuses_anything_but_tensors(tensors: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A wrong declaration fails where it is written, not when the model is loaded."""
    with pytest.raises(TypeError, match="example_input takes tensors"):
        example_input(*tensors, **named)


@pytest.mark.parametrize("attribute", ["example_input", "example_input_array"])
@pytest.mark.parametrize("container", [lambda x: x, lambda x: (x,), lambda x: [x]], ids=["tensor", "tuple", "list"])
def test_an_attribute_of_the_model_declares_an_example(attribute: str, container: Any) -> None:
    """A model can carry its example itself, also as Lightning names it."""
    model, x = nn.Identity(), torch.zeros(2, 3)
    setattr(model, attribute, container(x))
    example = find_example(model)
    assert isinstance(example, tuple)
    assert len(example) == 1
    assert example[0] is x


def test_the_factory_comes_before_the_model() -> None:
    """What the factory declares is closer to the user than what the model's author declared."""
    model = nn.Identity()
    model.example_input = torch.zeros(1, 1)

    @example_input(torch.zeros(1, 2))
    def factory() -> None: ...

    example = find_example(factory, model)
    assert isinstance(example, tuple)
    assert example[0].shape == (1, 2)


def test_a_method_of_that_name_declares_nothing() -> None:
    """A model may have a method called example_input, and Lightning's attribute is None until it is set."""

    class Model(nn.Identity):
        example_input_array = None

        def example_input(self) -> torch.Tensor:
            return torch.zeros(1)

    assert find_example(Model()) is None


@pytest.mark.parametrize("value", [3, "image", (), {}, (1, 2), {"x": [1.0]}, [torch.zeros(1), None]])
def test_an_example_of_something_else_is_refused(value: object) -> None:
    """The error says what the attribute must be and what it is."""
    model = nn.Identity()
    model.example_input = value  # type: ignore[assignment]
    with pytest.raises(ModelLoadError, match=f"example_input must be a tensor.*it is a {type(value).__name__}"):
        find_example(model)
