"""Tests of guardserve.loading.inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from guardserve.exceptions import GuardserveError, ModelLoadError, SettingsError
from guardserve.loading.examples import Example
from guardserve.loading.inputs import (
    InputFlags,
    Parameters,
    agreed_specs,
    forward_parameters,
    input_specs,
    servable_dtype,
)
from guardserve.signature import TensorSpec

NO_FLAGS = InputFlags({}, {})


def specs(
    parameters: Parameters, example: Example | None = None, shapes: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()
) -> tuple[TensorSpec, ...]:
    """Work out the inputs from flags as the user writes them."""
    return input_specs(parameters, example, InputFlags.parse(shapes, dtypes), "give --input-shape {name}=...")


def test_shapes_and_dtypes_are_read_by_name_and_without() -> None:
    """A name comes before the equals sign; without one the value is for the only input; no sizes mean a scalar."""
    flags = InputFlags.parse(["3,-1,240", "age=", "ids=7"], ["torch.int64", "ids=INT8", "x=BF16"])
    assert flags.shapes == {"": (3, -1, 240), "age": (), "ids": (7,)}
    assert flags.dtypes == {"": torch.int64, "ids": torch.int8, "x": torch.bfloat16}


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("3,x", "sizes are integers"),
        ("3,,4", "sizes are integers"),
        ("image=3;4", "sizes are integers"),
        ("1.5", "sizes are integers"),
        ("0,3", "0 is not a size"),
        ("image=3,-2", "-2 is not a size"),
        ("=3,4", "is incomplete"),
        ("=", "is incomplete"),
        ("", "is incomplete"),
    ],
)
def test_a_shape_that_cannot_be_read_is_refused(shape: str, reason: str) -> None:
    """The error shows the entry and says what is wrong with it."""
    with pytest.raises(SettingsError, match=f"input shape {shape!r}.*{reason}"):
        InputFlags.parse([shape], [])


@pytest.mark.parametrize("dtype", ["float", "complex64", "image=FP8", "torch.nn", "image="])
def test_a_dtype_that_cannot_be_read_is_refused(dtype: str) -> None:
    """The error lists the dtypes that can be used."""
    with pytest.raises(SettingsError, match=r"is not a dtype; use one of bool, uint8.*float32.*FP32"):
        InputFlags.parse([], [dtype])


@pytest.mark.parametrize("shapes", [["3", "4"], ["x=3", "x=3"]])
def test_two_shapes_for_one_input_are_refused(shapes: list[str]) -> None:
    """Neither of them would be more right than the other."""
    with pytest.raises(SettingsError, match="there is already one for"):
        InputFlags.parse(shapes, [])


@given(st.lists(st.text(alphabet="abc=,-0123 .\0\n", max_size=12), max_size=3))
def test_any_entry_is_read_or_refused(entries: list[str]) -> None:
    """Whatever the user writes, nothing but a SettingsError comes out."""
    try:
        flags = InputFlags.parse(entries, [])
    except SettingsError:
        return
    assert len(flags.shapes) == len(entries)
    assert all(size == -1 or size > 0 for shape in flags.shapes.values() for size in shape)


def test_forward_gives_the_names_of_the_inputs() -> None:
    """Required parameters come first, then those with a default; keywords with a default stay at it."""

    class Model(nn.Module):
        def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> None: ...

    assert forward_parameters(Model()) == Parameters(("image",), ("mask",))


def test_a_forward_of_any_arguments_numbers_them() -> None:
    """Parameters behind a star have no names but their positions."""

    class Model(nn.Module):
        def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> None: ...

    parameters = forward_parameters(Model())
    assert parameters == Parameters(("first",), variadic=True)
    assert [spec.name for spec in specs(parameters, (torch.zeros(1, 2),) * 3)] == ["first", "input_1", "input_2"]
    assert [spec.name for spec in specs(Parameters((), variadic=True), shapes=("3,4",))] == ["input_0"]
    named = specs(Parameters((), variadic=True), shapes=("input_0=3", "input_1=4"))
    assert [spec.shape for spec in named] == [(-1, 3), (-1, 4)]


def test_a_keyword_only_input_is_refused() -> None:
    """Requests are passed by position, so that this input could never arrive."""

    class Model(nn.Module):
        def forward(self, *, image: torch.Tensor) -> None: ...

    with pytest.raises(ModelLoadError, match="takes 'image' by keyword only"):
        forward_parameters(Model())


def test_a_module_without_a_forward_is_refused() -> None:
    """A container such as ModuleList is no model; a forward put on an instance is one."""
    model = nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(ModelLoadError, match="ModuleList has no forward"):
        forward_parameters(model)
    model.forward = lambda signal: signal
    assert forward_parameters(model) == Parameters(("signal",))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_gives_names_from_its_schema() -> None:
    """Scripted and traced modules keep the names of their parameters, whatever self is called."""

    class Model(nn.Module):
        def forward(this, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # noqa: N805
            return image if mask is None else image * mask

    assert forward_parameters(torch.jit.script(Model())) == Parameters(("image",), ("mask",))
    traced = torch.jit.trace(nn.BatchNorm1d(3).eval(), torch.zeros(2, 3))  # type: ignore[no-untyped-call]
    assert forward_parameters(traced) == Parameters(("input",))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_input_that_is_no_tensor_is_refused() -> None:
    """The error names the input and its type."""

    class Model(nn.Module):
        def forward(self, image: torch.Tensor, size: int) -> torch.Tensor:
            return image[:, :size]

    with pytest.raises(ModelLoadError, match="'size' of the TorchScript forward is a int: only tensors"):
        forward_parameters(torch.jit.script(Model()))


def test_an_example_gives_shapes_and_dtypes() -> None:
    """Dimension 0 is the batch, of any size; the rest is kept."""
    example = (torch.zeros(4, 3, 8), torch.zeros(4, dtype=torch.int64))
    assert specs(Parameters(("x", "ids")), example) == (
        TensorSpec("x", torch.float32, (-1, 3, 8)),
        TensorSpec("ids", torch.int64, (-1,)),
    )


def test_named_examples_come_in_the_order_of_forward() -> None:
    """Inputs are passed by position, in whatever order they were declared."""
    example = {"mask": torch.zeros(1, 2), "x": torch.zeros(1, 3)}
    assert [spec.name for spec in specs(Parameters(("x",), ("mask", "bias")), example)] == ["x", "mask"]


def test_flags_override_the_example() -> None:
    """Each flag replaces its part of an input and leaves the others."""
    example = {"x": torch.zeros(1, 3, 8), "ids": torch.zeros(1, 2, dtype=torch.int32)}
    assert specs(Parameters(("x", "ids")), example, ("x=3,-1",), ("ids=INT64",)) == (
        TensorSpec("x", torch.float32, (-1, 3, -1)),
        TensorSpec("ids", torch.int64, (-1, 2)),
    )


def test_flags_alone_are_enough() -> None:
    """Without an example an input is of float32, unless a flag says otherwise."""
    assert specs(Parameters(("x",)), shapes=("3,4",)) == (TensorSpec("x", torch.float32, (-1, 3, 4)),)
    assert specs(Parameters(("x",)), shapes=("x=",), dtypes=("uint8",)) == (TensorSpec("x", torch.uint8, (-1,)),)


def test_a_flag_brings_in_an_optional_input() -> None:
    """An input with a default is served when the user gives its shape, and left out otherwise."""
    parameters = Parameters(("x",), ("mask",))
    assert [spec.name for spec in specs(parameters, shapes=("3",))] == ["x"]
    assert [spec.name for spec in specs(parameters, shapes=("x=3", "mask=3"))] == ["x", "mask"]


@pytest.mark.parametrize(
    ("parameters", "shapes", "message"),
    [
        (Parameters(("x",)), (), r"shape of input 'x' is not known: give --input-shape x="),
        (Parameters(("x", "y")), ("x=3",), r"shape of input 'y' is not known: give --input-shape y="),
        (Parameters(("x",), ("mask", "bias")), ("x=3", "bias=3"), r"shape of input 'mask' is not known"),
        (Parameters((), variadic=True), (), r"inputs are not known: give --input-shape input_0="),
        (Parameters(()), (), r"inputs are not known"),
    ],
)
def test_a_shape_that_is_missing_is_asked_for(parameters: Parameters, shapes: tuple[str, ...], message: str) -> None:
    """The error names the input and the flag."""
    with pytest.raises(ModelLoadError, match=message):
        specs(parameters, shapes=shapes)


@pytest.mark.parametrize(
    ("parameters", "shapes", "message"),
    [
        (Parameters(("x", "y")), ("3",), "without a name is for a model with one input; name them: x, y"),
        (Parameters(("x",)), ("3", "x=3"), "without a name is for a model with one input"),
        (Parameters(("x",)), ("y=3",), "there is no input 'y'; forward takes: x"),
        (Parameters(()), ("3",), "1 inputs are given, but forward takes 0"),
    ],
)
def test_flags_that_do_not_fit_the_forward_are_refused(
    parameters: Parameters, shapes: tuple[str, ...], message: str
) -> None:
    """The error names the inputs that there are."""
    with pytest.raises(SettingsError, match=message):
        specs(parameters, shapes=shapes)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(1, 2), torch.zeros(1, 2)), "2 inputs are given, but forward takes 1: x"),
        ({"y": torch.zeros(1, 2)}, "there is no input 'y'; forward takes: x"),
        ((torch.tensor(1.0),), "'x' has no batch dimension"),
    ],
)
def test_an_example_that_does_not_fit_the_forward_is_refused(example: Any, message: str) -> None:
    """The error says that the declared example is wrong, and how."""
    with pytest.raises(ModelLoadError, match=f"declared example input does not fit the model: .*{message}"):
        specs(Parameters(("x",)), example)


def test_a_dtype_without_a_name_in_the_protocol_is_refused() -> None:
    """No request could carry it."""
    with pytest.raises(ModelLoadError, match=r"input 'x' has dtype torch.complex64"):
        specs(Parameters(("x",)), (torch.zeros(1, 2, dtype=torch.complex64),))
    assert servable_dtype("x", torch.float16) is torch.float16


@given(
    st.lists(st.sampled_from(["x", "y", "z"]), unique=True).map(tuple),
    st.lists(st.sampled_from(["p", "q"]), unique=True).map(tuple),
    st.booleans(),
    st.dictionaries(st.sampled_from(["x", "y", "p", "q", "input_1", "input_9"]), st.just((2,))),
    st.integers(0, 3),
)
def test_inputs_are_always_the_first_parameters(
    required: tuple[str, ...],
    optional: tuple[str, ...],
    variadic: bool,
    shapes: dict[str, tuple[int, ...]],
    shown: int,
) -> None:
    """However they are declared, inputs are named without a gap, in order, or refused."""
    parameters = Parameters(required, optional, variadic=variadic)
    example = tuple(torch.zeros(1, 5) for _ in range(shown)) or None
    try:
        inputs = input_specs(parameters, example, InputFlags(shapes, {}), "")
    except GuardserveError:
        return
    names = [spec.name for spec in inputs]
    everything = [*required, *optional, *(f"input_{len(required) + len(optional) + index}" for index in range(10))]
    assert names == everything[: len(names)]
    assert len(names) >= max(len(required), shown)
    assert set(shapes) <= set(names)
    assert all(spec.shape == (-1, *shapes.get(spec.name, (5,))) for spec in inputs)


def test_flags_narrow_a_program_but_do_not_contradict_it() -> None:
    """A free size takes a flag's; a fixed size, a rank and a dtype must agree with it; the batch is the program's."""
    fixed = (TensorSpec("x", torch.float32, (2, 3, -1)),)
    assert agreed_specs(fixed, NO_FLAGS) == fixed
    narrowed = agreed_specs(fixed, InputFlags.parse(["3,16"], ["float32"]))
    assert narrowed == (TensorSpec("x", torch.float32, (2, 3, 16)),)
    for shape in ("4,16", "-1,16", "3", "3,16,1", "x="):
        with pytest.raises(SettingsError, match=r"for 'x': the program was exported for \(3, -1\)"):
            agreed_specs(fixed, InputFlags.parse([shape], []))
    with pytest.raises(SettingsError, match=r"float16 for 'x': the program was exported for torch.float32"):
        agreed_specs(fixed, InputFlags.parse([], ["FP16"]))
    with pytest.raises(SettingsError, match="input shape for 'y', but the model's inputs are: x"):
        agreed_specs(fixed, InputFlags.parse(["y=3,16"], []))
