"""Loading a model from whatever the user named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from guardserve.exceptions import ModelLoadError
from guardserve.loading.checkpoints import load_pickled_module, load_weights
from guardserve.loading.devices import placed, resolve_device
from guardserve.loading.examples import find_example
from guardserve.loading.factories import build, is_reference
from guardserve.loading.files import FileKind, file_kind
from guardserve.loading.inputs import InputFlags, agreed_specs, forward_parameters, input_specs
from guardserve.loading.preprocessing import ImagePreprocessing, find_preprocessing
from guardserve.loading.programs import load_exported, load_torchscript
from guardserve.signature import TensorSpec

ALIASES = {"demo": "guardserve.demo.model:digits_cnn"}
"""Short names of sources."""

EAGER, TORCHSCRIPT, EXPORT = "pytorch_eager", "pytorch_torchscript", "pytorch_export"
"""Platforms, as clients are told."""

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
            found = _from_factory(reference, weights, beside, flags, allow_pickle=allow_pickle)
        else:
            path = Path(reference)
            kind = file_kind(path)
            if weights is not None:
                raise ModelLoadError(f"weights are for a factory's model, but {path} is a {kind.value}: leave them out")
            served_as = _name(name, path.stem)
            found = _from_file(path, kind, target, flags, allow_pickle=allow_pickle)
        _check_usable(found.module)
        module = placed(found.module, target)
    preprocessing = _preprocessing(image_preprocessing, found)
    return LoadedModel(served_as, module, found.inputs, found.platform, target, source, preprocessing)


class _Found(NamedTuple):
    """What a source gives."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    platform: str
    factory: object = None


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


def _from_factory(
    reference: str, weights: str | Path | None, beside: nn.Module | None, flags: InputFlags, *, allow_pickle: bool
) -> _Found:
    module, factory = build(reference)
    _check_apart(reference, module, beside)
    if weights is not None:
        load_weights(module, Path(weights), allow_pickle=allow_pickle)
    inputs = input_specs(forward_parameters(module), find_example(factory, module), flags, _DECLARE)
    return _Found(module, inputs, TORCHSCRIPT if isinstance(module, torch.jit.ScriptModule) else EAGER, factory)


def _from_file(path: Path, kind: FileKind, device: torch.device, flags: InputFlags, *, allow_pickle: bool) -> _Found:
    if kind is FileKind.EXPORT:
        module, fixed = load_exported(path, device, allow_pickle=allow_pickle)
        return _Found(module, agreed_specs(fixed, flags), EXPORT)
    if kind is FileKind.TORCHSCRIPT:
        scripted = load_torchscript(path, device)
        return _Found(scripted, input_specs(forward_parameters(scripted), None, flags, _FLAG), TORCHSCRIPT)
    pickled = load_pickled_module(path, allow_pickle=allow_pickle)
    return _Found(pickled, input_specs(forward_parameters(pickled), find_example(pickled), flags, _DECLARE), EAGER)


def _check_usable(module: nn.Module) -> None:
    """Refuse a model whose parameters have no shape yet, or can never change."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ModelLoadError(
            "the model has lazy layers that have no shape yet: run one forward in its factory, or give --weights"
        )
    if any(tensor.is_inference() for tensor in tensors):
        raise ModelLoadError(
            "the model was built under torch.inference_mode(), so that its state can never be updated or restored: "
            "build it outside, or under torch.no_grad()"
        )


def _preprocessing(given: str | None, found: _Found) -> ImagePreprocessing | None:
    """Return how images become the only input: as the user says, or else as the factory or the model declares it."""
    declared = find_preprocessing(found.factory, found.module)
    preprocessing = declared if given is None else ImagePreprocessing.parse(given)
    if preprocessing is not None:
        if len(found.inputs) != 1:
            names = ", ".join(spec.name for spec in found.inputs)
            raise ModelLoadError(f"image preprocessing is for models with one input, but this one takes {names}")
        preprocessing.check(found.inputs[0])
    return preprocessing
