"""What the command line is asked to audit, loaded without running code that the user did not name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guardserve.audit.example_files import fitted, load_example
from guardserve.audit.onnx_graph import onnx_subject
from guardserve.audit.subject import Subject
from guardserve.exceptions import ModelLoadError
from guardserve.loading.checkpoints import load_pickled_module, load_weights
from guardserve.loading.devices import placed, resolve_device
from guardserve.loading.examples import find_example
from guardserve.loading.factories import build, is_reference
from guardserve.loading.files import FileKind, file_kind, reason
from guardserve.loading.inputs import InputFlags, agreed_specs, forward_parameters, input_specs
from guardserve.loading.model import ALIASES
from guardserve.loading.programs import load_exported, load_torchscript
from guardserve.signature import TensorSpec

_REMEDY = "give --input-shape {name}=3,224,224, for one sample, or --example FILE"


@dataclass(frozen=True)
class Source:
    """A loaded model and where it came from.

    Attributes:
        name: What the user named.
        subject: The model.
        path: The file that it is in: the model's, or that of its factory's code; None when it is not known.
        line: Line of the factory in it.
    """

    name: str
    subject: Subject
    path: Path | None
    line: int | None = None


def load_source(
    source: str,
    *,
    weights: str | Path | None = None,
    example: str | Path | None = None,
    input_shapes: Sequence[str] = (),
    input_dtypes: Sequence[str] = (),
    device: str = "auto",
    allow_pickle: bool = False,
) -> Source:
    """Load what is to be audited.

    Args: source: ``package.module:factory``, ``demo``, or a file: a torch.export archive, a TorchScript file, an ONNX
        file, a state_dict or, where pickle is allowed, a module pickled by torch.save. weights: File of weights for a
        factory's model. example: File of example inputs. input_shapes: ``name=3,224,224`` for an input, without the
        batch; noise of that shape is the example then. input_dtypes: ``name=float32``, likewise. device: See
        :func:`guardserve.loading.resolve_device`. allow_pickle: Whether files may be loaded from which code would
        run.

    Raises:
        SettingsError: The device, a shape or a dtype cannot be used.
        ModelLoadError: The model or the example cannot be loaded.
        MissingExtraError: An ONNX file is named, and ``onnx`` is not installed.
    """
    flags = InputFlags.parse(input_shapes, input_dtypes)
    place = resolve_device(device)
    given = None if example is None else load_example(Path(example))
    reference = ALIASES.get(source, source)
    if is_reference(reference):
        module, factory = build(reference)
        if weights is not None:
            load_weights(module, Path(weights), allow_pickle=allow_pickle)
        shown = _factory_example(module, factory, flags) if given is None else given
        return Source(source, _module_subject(placed(module, place), shown), *_definition(factory))
    path = Path(reference)
    if weights is not None:
        raise ModelLoadError(f"weights are for a factory's model, but {path} is a file: leave them out")
    if path.suffix == ".onnx":
        return Source(source, onnx_subject(path, flags.shapes or given), path)
    return Source(source, _file_subject(path, place, flags, given, allow_pickle=allow_pickle), path)


def _file_subject(path: Path, device: torch.device, flags: InputFlags, given: Any, *, allow_pickle: bool) -> Subject:
    kind = file_kind(path)
    module: nn.Module
    if kind is FileKind.EXPORT:
        module, specs = load_exported(path, device, allow_pickle=allow_pickle)
        shown = _made_up(agreed_specs(specs, flags)) if given is None else given
        return _module_subject(module, shown)
    if kind is FileKind.TORCHSCRIPT:
        module = load_torchscript(path, device)
        return _module_subject(module, _factory_example(module, None, flags) if given is None else given)
    state = _read_state(path, kind)
    if state is not None:
        return Subject.of_state_dict(state, flags.shapes or given)
    module = load_pickled_module(path, allow_pickle=allow_pickle)
    shown = _factory_example(module, None, flags) if given is None else given
    return _module_subject(placed(module, device), shown)


def _module_subject(module: nn.Module, example: Any) -> Subject:
    shown, note = fitted(example, module)
    subject = Subject.of_module(module, shown)
    subject.note = note
    return subject


def _read_state(path: Path, kind: FileKind) -> dict[str, torch.Tensor] | None:
    """Read the tensors of a checkpoint, those in nested dicts under dotted names; None when it holds more than data."""
    try:
        if kind is FileKind.SAFETENSORS:
            from safetensors.torch import load_file  # noqa: PLC0415 - importing guardserve loads torch only

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if kind is FileKind.SAFETENSORS:
            raise ModelLoadError(f"{path} is a damaged or truncated safetensors file: {reason(error)}") from error
        return None  # load_pickled_module finds the same fault, and says what it is
    tensors = dict(_tensors(content, "")) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ModelLoadError(f"{path} holds no tensors by name: it is neither a state_dict nor a checkpoint with one")
    return tensors


def _tensors(content: Mapping[Any, Any], prefix: str) -> list[tuple[str, torch.Tensor]]:
    found = []
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            found.append((f"{prefix}{key}", value))
        elif isinstance(value, Mapping):
            found += _tensors(value, f"{prefix}{key}.")
    return found


def _factory_example(module: nn.Module, factory: object, flags: InputFlags) -> Any:
    """Return the declared example, or noise of the declared or given shapes; None when nothing is known."""
    declared = find_example(factory, module)
    if declared is None and not flags.shapes:
        return None
    specs = input_specs(forward_parameters(module), declared, flags, _REMEDY)
    if declared is None or flags.shapes or flags.dtypes:
        return _made_up(specs)
    tensors = list(declared.values() if isinstance(declared, Mapping) else declared)
    # a constant declares a shape, and so does a whole number if it is 0; that is no data that a model be judged on
    shaped = [bool((t == (t.flatten()[:1] if t.is_floating_point() else 0)).all()) for t in tensors]
    if all(shaped) and not all(tensor.is_floating_point() for tensor in tensors):
        filled = list(_made_up(specs))
    else:
        filled = [
            spec.example(len(tensor)) if shape_only and tensor.is_floating_point() else tensor
            for spec, tensor, shape_only in zip(specs, tensors, shaped, strict=False)
        ]
    return dict(zip(declared, filled, strict=True)) if isinstance(declared, Mapping) else tuple(filled)


def _made_up(specs: Sequence[TensorSpec]) -> tuple[torch.Tensor, ...]:
    """Make an example; whole numbers come in two rows of different lengths, as one of zeros shows nothing."""
    rows = 1 if all(spec.dtype.is_floating_point for spec in specs) else 2
    return tuple(spec.example(rows, varied=True) for spec in specs)


def _definition(factory: Any) -> tuple[Path | None, int | None]:
    """Return the file and line of a factory."""
    with suppress(TypeError, OSError):
        target = factory if inspect.isroutine(factory) or inspect.isclass(factory) else type(factory)
        file = inspect.getsourcefile(target)
        if file is not None:
            path = Path(file)
            with suppress(ValueError):
                path = path.relative_to(Path.cwd())
            return path, inspect.getsourcelines(target)[1]
    return None, None
