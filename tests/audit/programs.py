"""Programs made of models: TorchScript, torch.export and torch.fx, in whatever mode the model is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram


class Around(nn.Module):
    """An eager module with a program in it."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any) -> Any:
        """Hand everything on."""
        return self.program(*args)


@contextmanager
def silence() -> Iterator[None]:
    """Let torch deprecate its own tools in peace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def traced(model: nn.Module, example: Any) -> torch.jit.ScriptModule:
    """Trace a copy of a model."""
    with silence():
        program: torch.jit.ScriptModule = torch.jit.trace(
            copy.deepcopy(model), example, check_trace=False, strict=False
        )  # type: ignore[no-untyped-call]
    return program


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    """Script a copy of a model."""
    with silence():
        program: torch.jit.ScriptModule = torch.jit.script(copy.deepcopy(model))
    return program


def frozen(model: nn.Module) -> torch.jit.ScriptModule:
    """Script a copy of a model in eval mode and freeze it."""
    with silence():
        program: torch.jit.ScriptModule = torch.jit.freeze(scripted(model).eval())
    return program


def exported(model: nn.Module, example: Any, *, dynamic: bool = True) -> ExportedProgram:
    """Export a copy of a model, for any batch size unless it is to be that of the example."""
    args = example if isinstance(example, tuple) else (example,)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in args) if dynamic else None
    with silence():
        return torch.export.export(copy.deepcopy(model), args, dynamic_shapes=shapes)


def every_kind(model: nn.Module, example: Any) -> dict[str, Any]:
    """Freeze a model's present mode into every kind of graph."""
    program = exported(model, example)
    with silence():
        return {
            "traced": traced(model, example).eval(),
            "exported": program,
            "decomposed": program.run_decompositions(),
            "module": program.module(),
            "unflattened": torch.export.unflatten(program),
            "inside": Around(traced(model, example)).eval(),
        }
