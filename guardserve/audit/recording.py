"""Finding the innermost module whose output for a sample is the first to differ between two batches."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from guardserve.audit.comparison import Part, worst_difference
from guardserve.audit.examples import Example
from guardserve.audit.workbench import Workbench

Record: TypeAlias = list[tuple[str, list[Part]]]
"""Modules in the order in which they finished, each with what belongs to the sample of its output."""


def record(bench: Workbench, example: Example, take: Callable[[int, Any], Iterable[Part]]) -> Record:
    """Run a model, and keep what belongs to the sample of every module's output.

    Args:
        bench: The model.
        example: Its input.
        take: Given the number of modules that have finished and a module's output, yields the sample's part of it.
    """
    kept: Record = []
    names = {module: name for name, module in bench.model.named_modules()}
    thread = threading.get_ident()

    def hook(module: nn.Module, args: object, output: object) -> None:
        del args
        if module in names and threading.get_ident() == thread:
            # an operation in place may change the output later
            parts = [part._replace(values=part.values.clone()) for part in take(len(kept), output)]
            kept.append((names[module], parts))

    # a global hook sees modules of TorchScript too, which take none of their own
    handle = register_module_forward_hook(hook)
    try:
        bench.run(example.args, example.kwargs)
    finally:
        handle.remove()
    return kept


def first_difference(here: Record, there: Record, allowed: float, *, labels: bool) -> str | None:
    """Return the first module that differs; None when none does, or when the modules ran in another order."""
    for (name, parts), (other, others) in itertools.zip_longest(here, there, fillvalue=("", [])):
        if name != other:
            return None
        found = worst_difference(parts, others, allowed, labels=labels)
        if found is not None and found.is_real:
            return name
    return None
