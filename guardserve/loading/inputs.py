"""What a model takes: its input specs, from its forward, its example and the user's flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from guardserve.exceptions import ModelLoadError, SettingsError
from guardserve.loading.examples import Example
from guardserve.signature import DATATYPES, TensorSpec

_T = TypeVar("_T")

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DATATYPES.values()} | dict(DATATYPES)


@dataclass(frozen=True)
class InputFlags:
    """The shapes and dtypes that the user gave, by input name.

    Attributes:
        shapes: Sizes without the batch dimension; -1 is any size. The name "" is the only input of the model.
        dtypes: Element types, by the same names.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def parse(cls, shapes: Sequence[str], dtypes: Sequence[str]) -> InputFlags:
        """Read ``name=3,240,240`` and ``name=float32`` entries, of which ``name=`` may be left out.

        Raises:
            SettingsError: An entry cannot be read, or two are for the same input.
        """
        return cls(_entries("input shape", shapes, _shape), _entries("input dtype", dtypes, _dtype))

    def bind(self, names: Sequence[str]) -> InputFlags:
        """Put the name of the only input on unnamed entries.

        Raises:
            SettingsError: An entry is for an input that is not there, or has no name and the model has several inputs.
        """
        return InputFlags(_bound("input shape", self.shapes, names), _bound("input dtype", self.dtypes, names))


def _entries(what: str, entries: Sequence[str], parse: Callable[[str], _T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for entry in entries:
        name, named, value = entry.rpartition("=")
        if not name and (named or not value):
            raise SettingsError(f"{what} {entry!r} is incomplete: write it as name=VALUE")
        if name in found:
            raise SettingsError(f"{what} {entry!r}: there is already one for {name or 'the only input'!r}")
        try:
            found[name] = parse(value)
        except ValueError as error:
            raise SettingsError(f"{what} {entry!r}: {error}") from None
    return found


def _shape(value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in value.split(",")) if value else ()
    except ValueError:
        raise ValueError("sizes are integers with commas between them, such as 3,224,224") from None
    for size in sizes:
        if size < 1 and size != -1:
            raise ValueError(f"{size} is not a size; use a positive number, or -1 for any")
    return sizes


def _dtype(value: str) -> torch.dtype:
    try:
        return _DTYPES[value.removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"{value!r} is not a dtype; use one of {', '.join(_DTYPES)}") from None


def _bound(what: str, entries: Mapping[str, _T], names: Sequence[str]) -> dict[str, _T]:
    listed = ", ".join(names)
    if "" in entries and (len(entries) > 1 or len(names) != 1):
        raise SettingsError(f"an {what} without a name is for a model with one input; name them: {listed}")
    unknown = [name for name in entries if name and name not in names]
    if unknown:
        raise SettingsError(f"{what} for {unknown[0]!r}, but the model's inputs are: {listed}")
    return {name or names[0]: value for name, value in entries.items()}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a forward that tensors can be passed to, by position.

    Attributes:
        required: Names of those without a default, which come first.
        optional: Names of those with a default.
        variadic: Whether it takes more, as ``*args`` does; these are called ``input_N`` by their position N.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    variadic: bool = False

    def names(self, named: Iterable[str], count: int) -> tuple[str, ...]:
        """Name the inputs: the required ones and more, up to the last one named and to at least ``count``.

        Raises:
            SettingsError: A name is of no parameter, or there are fewer than ``count``.
        """
        known = [*self.required, *self.optional]
        wanted = tuple(named)
        if self.variadic:
            known += [f"input_{len(known) + index}" for index in range(len(wanted) + count)]
        for name in wanted:
            if name not in known:
                raise SettingsError(f"there is no input {name!r}; forward takes: {', '.join(known) or 'none'}")
        if count > len(known):
            raise SettingsError(f"{count} inputs are given, but forward takes {len(known)}: {', '.join(known)}")
        last = max((known.index(name) + 1 for name in wanted), default=0)
        return tuple(known[: max(len(self.required), last, count)])


def forward_parameters(module: nn.Module) -> Parameters:
    """Read the parameters of a model's forward, of an eager module or of a TorchScript one.

    Raises:
        ModelLoadError: The module has no forward, or one that tensors cannot be passed to by position.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return _scripted_parameters(module)
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise ModelLoadError(f"{type(module).__name__} has no forward: it cannot be served")
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that Python cannot look into
        return Parameters((), variadic=True)
    positional = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise ModelLoadError(
                f"forward of {type(module).__name__} takes {parameter.name!r} by keyword only, but inputs are passed "
                "by position: wrap the model in one whose forward takes it so"
            )
    return Parameters(
        tuple(p.name for p in positional if p.default is p.empty),
        tuple(p.name for p in positional if p.default is not p.empty),
        variadic=any(p.kind is p.VAR_POSITIONAL for p in parameters),
    )


def _scripted_parameters(module: torch.jit.ScriptModule) -> Parameters:
    try:
        schema: torch.FunctionSchema = module.forward.schema  # type: ignore[attr-defined]
    except AttributeError:
        raise ModelLoadError("the TorchScript module has no forward: it cannot be served") from None
    arguments = schema.arguments[1:]  # the first one is self
    required = [argument for argument in arguments if not argument.has_default_value()]
    for argument in required:
        if argument.type.kind() != "TensorType":
            raise ModelLoadError(
                f"input {argument.name!r} of the TorchScript forward is a {argument.type}: only tensors can be served"
            )
    # tracing numbers the names of values, as in "image.1"
    names = [argument.name.partition(".")[0] for argument in arguments]
    return Parameters(tuple(names[: len(required)]), tuple(names[len(required) :]))


def input_specs(
    parameters: Parameters, example: Example | None, flags: InputFlags, remedy: str
) -> tuple[TensorSpec, ...]:
    """Work out what a model takes.

    Args:
        parameters: What its forward takes.
        example: Tensors to read shapes and dtypes from, dimension 0 being the batch.
        flags: What the user gave; it overrides the example.
        remedy: How to declare an input whose shape is not known; ``{name}`` stands for its name.

    Raises:
        SettingsError: The flags do not fit the forward.
        ModelLoadError: The example does not fit the forward, or the shape of an input is not known.
    """
    try:
        shown = _named_example(parameters, example)
    except SettingsError as error:
        raise ModelLoadError(f"the declared example input does not fit the model: {error}") from None
    named = [name for name in (*flags.shapes, *flags.dtypes, *shown) if name]
    names = parameters.names(named, count=1 if "" in flags.shapes else 0)
    if not names:
        raise ModelLoadError(f"the model's inputs are not known: {remedy.format(name='input_0')}")
    bound = flags.bind(names)
    specs = []
    for name in names:
        tensor = shown.get(name)
        shape = bound.shapes.get(name) if tensor is None else bound.shapes.get(name, tuple(tensor.shape[1:]))
        if shape is None:
            raise ModelLoadError(f"the shape of input {name!r} is not known: {remedy.format(name=name)}")
        dtype = bound.dtypes.get(name, torch.float32 if tensor is None else tensor.dtype)
        specs.append(TensorSpec(name, servable_dtype(name, dtype), (-1, *shape)))
    return tuple(specs)


def _named_example(parameters: Parameters, example: Example | None) -> dict[str, torch.Tensor]:
    if example is None:
        return {}
    if isinstance(example, Mapping):
        parameters.names(example, 0)
        shown = dict(example)
    else:
        shown = dict(zip(parameters.names((), len(example)), example, strict=False))
    for name, tensor in shown.items():
        if tensor.ndim == 0:
            raise SettingsError(f"{name!r} has no batch dimension: its tensor is a scalar")
    return shown


def servable_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return a dtype that requests can carry.

    Raises:
        ModelLoadError: They cannot carry this one.
    """
    if dtype not in DATATYPES.values():
        raise ModelLoadError(f"input {name!r} has dtype {dtype}, which the inference protocol has no name for")
    return dtype


def agreed_specs(specs: Sequence[TensorSpec], flags: InputFlags) -> tuple[TensorSpec, ...]:
    """Narrow the free sizes of specs that a program fixes to those that the user gave.

    Raises:
        SettingsError: A flag contradicts the program.
    """
    bound = flags.bind([spec.name for spec in specs])
    agreed = []
    for spec in specs:
        sizes = spec.shape[1:]
        given = bound.shapes.get(spec.name, sizes)
        if len(given) != len(sizes) or any(size not in (-1, flag) for size, flag in zip(sizes, given, strict=True)):
            raise SettingsError(
                f"input shape {given} for {spec.name!r}: the program was exported for {sizes} (without the batch)"
            )
        if bound.dtypes.get(spec.name, spec.dtype) != spec.dtype:
            raise SettingsError(
                f"input dtype {bound.dtypes[spec.name]} for {spec.name!r}: the program was exported for {spec.dtype}"
            )
        agreed.append(TensorSpec(spec.name, spec.dtype, (spec.shape[0], *given)))
    return tuple(agreed)
