"""Saved programs: ``torch.export`` archives and TorchScript files."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils import _pytree as pytree

from guardserve.exceptions import ModelLoadError
from guardserve.loading.archives import refuse_code
from guardserve.loading.files import reason
from guardserve.loading.inputs import servable_dtype
from guardserve.signature import TensorSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def load_exported(path: Path, device: torch.device, *, allow_pickle: bool) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    """Load a program that torch.export.save wrote.

    Returns:
        Its module on the device, and its inputs, with the sizes that the export fixed.

    Raises:
        PickleRefusedError: Loading it would unpickle more than tensors, and pickle is not allowed.
        ModelLoadError: It cannot be loaded, or takes inputs that cannot be served.
    """
    try:
        # torch.export.load would fall back to older formats, and hide the reason for it in a log
        from torch.export.pt2_archive._package import load_pt2  # noqa: PLC0415 - slow to import, and rarely needed
    except ImportError as error:
        raise ModelLoadError(f"{path}: torch {torch.__version__} is too old to load a torch.export archive") from error

    try:
        with path.open("rb") as file:
            if not allow_pickle:
                refuse_code(file, path)
            file.seek(0)
            programs = load_pt2(file).exported_programs
        program = _only(programs, path)
        inputs = _program_inputs(program)
        return _module(program, device), inputs
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{path} cannot be loaded by torch {torch.__version__}: {reason(error)}") from error


def _only(programs: dict[str, ExportedProgram], path: Path) -> ExportedProgram:
    if len(programs) != 1:
        raise ModelLoadError(f"{path} holds {len(programs)} programs ({', '.join(programs)}), not one")
    return next(iter(programs.values()))


def _module(program: ExportedProgram, device: torch.device) -> nn.Module:
    if device.type != "cpu" or any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        program = move_to_device_pass(program, device)
    # guards are made from text in the archive; the sizes of inputs are checked without them
    guards = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**guards)


def _program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    names = program.graph_signature.user_inputs
    # putting the inputs' numbers where the inputs go shows how they are passed
    structure = pytree.tree_unflatten(list(range(len(names))), program.call_spec.in_spec)
    if structure != (tuple(range(len(names))), {}):
        raise ModelLoadError(
            f"the exported program takes its inputs by keyword or nested ({structure}), not one after the other: "
            "export a model whose forward takes each tensor by position"
        )
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(_input_spec(name, values.get(name)) for name in names)


def _input_spec(name: object, value: object) -> TensorSpec:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ModelLoadError(f"the exported program has an input that is not a tensor ({name!r}): leave it out")
    if value.ndim == 0:
        raise ModelLoadError(f"input {name!r} of the exported program is a scalar: it has no batch dimension")
    shape = tuple(size if type(size) is int else -1 for size in value.shape)
    return TensorSpec(name, servable_dtype(name, value.dtype), shape)


def load_torchscript(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a TorchScript file onto a device.

    Raises:
        ModelLoadError: It cannot be loaded.
    """
    try:
        with warnings.catch_warnings():
            # whoever serves a TorchScript file knows that it is one
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.load`", category=DeprecationWarning)
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
            return module
    except Exception as error:
        raise ModelLoadError(f"{path} is a damaged TorchScript file, or does not run here: {reason(error)}") from error
