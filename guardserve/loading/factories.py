"""Model factories: ``package.module:factory``, imported and called."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from guardserve.exceptions import ModelLoadError

_REFERENCE = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)")


def is_reference(source: str) -> bool:
    """Tell whether a source has the form ``package.module:factory``."""
    return _REFERENCE.fullmatch(source) is not None


@contextmanager
def importable_cwd() -> Iterator[None]:
    """Make modules in the working directory importable for a while.

    A console script starts with its own folder on the path, not the working directory, where a user who names
    ``models:resnet`` means it to be. It is taken off again: what the server imports later is none of its business.
    """
    cwd = str(Path.cwd())
    if cwd in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, cwd)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(cwd)


def build(reference: str) -> tuple[nn.Module, object]:
    """Import a factory and build its model.

    Args:
        reference: ``package.module:factory``, where the factory is a callable without arguments, a module class or
            a module, and may be an attribute of an attribute.

    Returns:
        The model, and the factory that it came from.

    Raises:
        ModelLoadError: It cannot be imported, is not there, fails, or does not give an ``nn.Module``.
    """
    module_name, _, path = reference.partition(":")
    with importable_cwd():
        factory = _attribute(_import(module_name, reference), path, reference)
        model = factory if isinstance(factory, nn.Module) else _call(factory, reference)
    if not isinstance(model, nn.Module):
        raise ModelLoadError(f"{reference} returned a {type(model).__name__}, not a torch.nn.Module")
    return model, factory


def _import(name: str, reference: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise ModelLoadError(f"{reference}: importing {name} failed: {error}; install what is missing") from error
        raise ModelLoadError(
            f"{reference}: there is no module {error.name!r}, neither installed nor in {Path.cwd()}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelLoadError(f"{reference}: importing {name} failed: {type(error).__name__}: {error}") from error


def _attribute(found: Any, path: str, reference: str) -> Any:
    for name in path.split("."):
        found = _member(found, name, reference)
    return found


def _member(owner: Any, name: str, reference: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(owner))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        called = getattr(owner, "__name__", type(owner).__name__)
        raise ModelLoadError(f"{reference}: {called} has no attribute {name!r}{hint}") from error
    except Exception as error:  # a module that imports its parts when they are asked for
        raise ModelLoadError(f"{reference}: {type(error).__name__}: {error}") from error


def _call(factory: Any, reference: str) -> object:
    if not callable(factory):
        raise ModelLoadError(
            f"{reference} is a {type(factory).__name__}: name a function, an nn.Module class or an nn.Module"
        )
    if needed := _required_arguments(factory):
        raise ModelLoadError(
            f"{reference} needs arguments ({', '.join(needed)}), but a factory is called without: "
            "name a function that builds the model with the right ones"
        )
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ModelLoadError(f"{reference} raised {type(error).__name__}: {error}") from error


def _required_arguments(factory: Any) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable that Python cannot look into: calling it will tell
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    ]
