"""Loading a model from whatever the user named."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from guardserve.exceptions import ModelLoadError
from guardserve.loading.checkpoints import load_pickled_module, load_weights
from guardserve.loading.devices import resolve_device
from guardserve.loading.examples import find_example
from guardserve.loading.factories import build, is_reference
from guardserve.loading.files import FileKind, file_kind, reason
from guardserve.loading.inputs import InputFlags, agreed_specs, forward_parameters, input_specs
from guardserve.loading.preprocessing import ImagePreprocessing, find_preprocessing
from guardserve.loading.programs import load_exported, load_torchscript
from guardserve.signature import TensorSpec

ALIASES = {"demo": "guardserve.demo.model:digits_cnn"}
"""Short names of sources."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DECLARE = "decorate the factory with @example_input(torch.zeros(1, ...)), or give --input-shape {name}=3,224,224"
_FLAG = "TorchScript does not record it; give --input-shape {name}=3,224,224, for one sample"


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to be guarded.

    Attributes:
        name: Name to serve it under, of letters, digits, dots, dashes and underscores.
        module: The model, on the device. Its training flags are as the source left them.
        inputs: What its forward takes, in order.
        platform: ``pytorch_eager``, ``pytorch_torchscript`` or ``pytorch_export``.
        device: Where its parameters are and its inputs must be.
        source: What the user named.
        preprocessing: How images become its only input, if that is declared.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    platform: str
    device: torch.device
    source: str
    preprocessing: ImagePreprocessing | None = None


def load_model(
    source: str,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    allow_pickle: bool = False,
    input_shapes: Sequence[str] = (),
    input_dtypes: Sequence[str] = (),
    name: str | None = None,
    image_preprocessing: str | None = None,
    beside: nn.Module | None = None,
) -> LoadedModel:
    """Load a model and work out what it takes.

    Args:
        source: ``package.module:factory``, ``demo``, or a file: a torch.export archive, a TorchScript file or, where
            pickle is allowed, a module pickled by torch.save.
        weights: File of weights for a factory's model, with exactly its keys.
        device: See :func:`resolve_device`.
        allow_pickle: Whether files may be loaded from which code would run.
        input_shapes: ``name=3,224,224`` for an input, without the batch dimension; -1 is any size, ``name=`` a scalar
            for each sample. The name may be left out when there is one input. Given shapes override an example's.
        input_dtypes: ``name=float32``, likewise, as torch or the inference protocol names it; float32 if not known.
        name: Name to serve the model under; by default the factory's, or the file's without its suffix.
        image_preprocessing: How images become its only input: see :meth:`ImagePreprocessing.parse`; by default as its
            factory declares it with ``@image_preprocessing``.
        beside: A model in use, of which the new one must share no module.

    Returns:
        The model. It is in the mode in which the source left it.

    Raises:
        SettingsError: The device, a shape or a dtype cannot be used.
        PickleRefusedError: Loading would run code from a pickle.
        ModelLoadError: The model cannot be loaded, or its inputs or its name are not known.
    """
    flags = InputFlags.parse(input_shapes, input_dtypes)
    target = resolve_device(device)
    reference = ALIASES.get(source, source)
    # parameters made in a caller's inference mode could never be updated, nor buffers restored
    with torch.inference_mode(mode=False):
        if is_reference(reference):
            served_as = _name(name, reference.rpartition(":")[2].rpartition(".")[2])
            module, factory = build(reference)
            _check_apart(reference, module, beside)
            if weights is not None:
                load_weights(module, Path(weights), allow_pickle=allow_pickle)
            inputs = input_specs(forward_parameters(module), find_example(factory, module), flags, _DECLARE)
            platform = "pytorch_torchscript" if isinstance(module, torch.jit.ScriptModule) else "pytorch_eager"
            declared = find_preprocessing(factory, module)
        else:
            path = Path(reference)
            kind = file_kind(path)
            if weights is not None:
                raise ModelLoadError(f"weights are for a factory's model, but {path} is a {kind.value}: leave them out")
            served_as = _name(name, path.stem)
            module, inputs, platform = _from_file(path, kind, target, flags, allow_pickle=allow_pickle)
            declared = find_preprocessing(module)
        module = _on_device(module, target)
    preprocessing = declared if image_preprocessing is None else ImagePreprocessing.parse(image_preprocessing)
    if preprocessing is not None:
        _check_preprocessing(preprocessing, inputs)
    return LoadedModel(served_as, module, inputs, platform, target, source, preprocessing)


def _name(given: str | None, default: str) -> str:
    name = default if given is None else given
    if not _NAME.fullmatch(name):
        raise ModelLoadError(
            f"{name!r} cannot be a model's name, which is made of letters, digits, dots, dashes and underscores: "
            "choose one with --name"
        )
    return name


def _check_apart(reference: str, module: nn.Module, beside: nn.Module | None) -> None:
    """Refuse a module that is in use already: weights loaded into it would change what it answers."""
    used = set() if beside is None else set(map(id, beside.modules()))
    if not used.isdisjoint(map(id, module.modules())):
        raise ModelLoadError(
            f"{reference} gives the same module each time: have a function make a new one to load it again"
        )


def _check_preprocessing(preprocessing: ImagePreprocessing, inputs: Sequence[TensorSpec]) -> None:
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise ModelLoadError(f"image preprocessing is for models with one input, but this one takes {names}")
    preprocessing.check(inputs[0])


def _from_file(
    path: Path, kind: FileKind, device: torch.device, flags: InputFlags, *, allow_pickle: bool
) -> tuple[nn.Module, tuple[TensorSpec, ...], str]:
    if kind is FileKind.EXPORT:
        module, fixed = load_exported(path, device, allow_pickle=allow_pickle)
        return module, agreed_specs(fixed, flags), "pytorch_export"
    if kind is FileKind.TORCHSCRIPT:
        scripted = load_torchscript(path, device)
        return scripted, input_specs(forward_parameters(scripted), None, flags, _FLAG), "pytorch_torchscript"
    pickled = load_pickled_module(path, allow_pickle=allow_pickle)
    return pickled, input_specs(forward_parameters(pickled), find_example(pickled), flags, _DECLARE), "pytorch_eager"


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    if any(is_lazy(tensor) for tensor in itertools.chain(module.parameters(), module.buffers())):
        raise ModelLoadError(
            "the model has lazy layers that have no shape yet: run one forward in its factory, or give --weights"
        )
    if any(tensor.is_inference() for tensor in itertools.chain(module.parameters(), module.buffers())):
        raise ModelLoadError(
            "the model was built under torch.inference_mode(), so that its state can never be updated or restored: "
            "build it outside, or under torch.no_grad()"
        )
    try:
        return module.to(device)
    except Exception as error:
        raise ModelLoadError(f"the model cannot be moved to {device}: {reason(error)}") from error
