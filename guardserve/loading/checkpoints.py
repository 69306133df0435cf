"""Files that hold tensors or a pickle: weights for a factory, and pickled modules where those are allowed."""

from __future__ import annotations

import logging
import pickle  # nosec B403
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from guardserve.exceptions import ModelLoadError, PickleRefusedError
from guardserve.loading.factories import importable_cwd
from guardserve.loading.files import FileKind, file_kind, reason

_NESTS = ("state_dict", "model_state_dict", "model")
_PARALLEL_PREFIX = "module."

_log = logging.getLogger(__name__)


def load_weights(module: nn.Module, path: Path, *, allow_pickle: bool) -> None:
    """Put the weights in a file into a module, every key of it and no other.

    The file holds a state_dict, in safetensors or saved with torch.save, there bare or under one of the keys
    ``state_dict``, ``model_state_dict`` and ``model``. A ``module.`` before every key, which training under
    DistributedDataParallel leaves, is taken off.

    Raises:
        PickleRefusedError: The file holds more than tensors, and pickle is not allowed.
        ModelLoadError: The file cannot be read, or its weights do not fit the module.
    """
    state = _state_dict(_read(path, allow_pickle=allow_pickle), path)
    expected = module.state_dict()
    if _all_prefixed(state) and not _all_prefixed(expected):
        consume_prefix_in_state_dict_if_present(state, _PARALLEL_PREFIX)
        _log.info("%s: took the prefix %r off all %d keys", path, _PARALLEL_PREFIX, len(state))
    for key in state.keys() & expected.keys():
        given, wanted = state[key].dtype, expected[key].dtype
        if not torch.can_cast(given, wanted):
            raise ModelLoadError(
                f"the weights in {path} do not fit {type(module).__name__}: "
                f"{key} is {given}, and {wanted} cannot hold it"
            )
    try:
        module.load_state_dict(state)
    except Exception as error:
        difference = _differences(state, expected) or reason(error)
        raise ModelLoadError(f"the weights in {path} do not fit {type(module).__name__}: {difference}") from error


def load_pickled_module(path: Path, *, allow_pickle: bool) -> nn.Module:
    """Load a module that was pickled whole by torch.save.

    Raises:
        PickleRefusedError: Pickle is not allowed.
        ModelLoadError: The file cannot be read, or holds weights or something else than a module.
    """
    content = _read(path, allow_pickle=allow_pickle)
    if isinstance(content, nn.Module):
        return content
    _state_dict(content, path)
    raise ModelLoadError(
        f"{path} is a state_dict: it holds weights, but no code to run them. "
        f"Serve the code with them: guardserve serve package.module:factory --weights {path}"
    )


def _read(path: Path, *, allow_pickle: bool) -> Any:
    kind = file_kind(path)
    if kind is FileKind.SAFETENSORS:
        return _read_safetensors(path)
    if kind is not FileKind.CHECKPOINT:
        raise ModelLoadError(f"{path} is a {kind.value}, not a file of weights: serve it by itself")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise _refusal(path, str(error)) from error
    except Exception as error:
        raise ModelLoadError(f"{path} is damaged or truncated: {reason(error)}") from error
    _log.warning("unpickling %s, which can run any code that is in it", path)
    try:
        with importable_cwd():
            return torch.load(path, map_location="cpu", weights_only=False)  # nosec B614
    except Exception as error:
        raise ModelLoadError(
            f"{path} cannot be unpickled: {type(error).__name__}: {reason(error)}. "
            "The classes that it was saved with must be importable under the same names"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file  # noqa: PLC0415 - importing guardserve loads torch only

    try:
        return load_file(path)
    except Exception as error:
        raise ModelLoadError(f"{path} is a damaged or truncated safetensors file: {reason(error)}") from error


def _refusal(path: Path, message: str) -> PickleRefusedError:
    match = re.search(r"GLOBAL ([\w.]+)", message)
    content = f"a pickled {match[1]}" if match else "pickled objects that are not tensors"
    return PickleRefusedError(
        f"{path} holds {content}: loading it would run code from the file. Save the weights alone, with "
        "torch.save(model.state_dict(), 'weights.pt'), and name their code: guardserve serve package.module:factory "
        "--weights weights.pt; or save a program with torch.export.save. If you trust the file: --allow-pickle"
    )


def _state_dict(content: object, path: Path) -> dict[str, Any]:
    """Return the state_dict that a file's content is or holds."""
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, not a state_dict or a module")
    nests = [key for key in _NESTS if isinstance(content.get(key), dict)]
    if len(nests) > 1:
        raise ModelLoadError(f"{path} holds several state_dicts ({', '.join(nests)}): save the one to be served alone")
    state: dict[Any, Any] = content[nests[0]] if nests else content
    odd = [key for key, value in state.items() if not (isinstance(key, str) and _is_state(key, value))]
    if odd or not state:
        keys = f"{_first(list(state))}, and {odd[0]!r} is a {type(state[odd[0]]).__name__}" if odd else "none"
        raise ModelLoadError(f"{path} does not hold a state_dict, a dict of tensors by name: its keys are {keys}")
    if nests:
        _log.info("%s: took the state_dict under the key %r", path, nests[0])
    return state


def _is_state(key: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) or key.rpartition(".")[2] == nn.modules.module._EXTRA_STATE_KEY_SUFFIX  # noqa: SLF001


def _all_prefixed(state: dict[str, Any]) -> bool:
    return all(key.startswith(_PARALLEL_PREFIX) for key in state)


def _differences(state: dict[str, Any], expected: dict[str, Any]) -> str:
    """List the keys that a module lacks, has in excess, or has in another shape; empty when there are none."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    mismatched = [
        f"{key} ({list(value.shape)} in the file, {list(expected[key].shape)} in the model)"
        for key, value in state.items()
        if key in expected and getattr(value, "shape", None) != getattr(expected[key], "shape", None)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    return "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in kinds.items() if keys)


def _first(keys: Sequence[object], limit: int = 4) -> str:
    return ", ".join(map(str, keys[:limit])) + (", ..." if len(keys) > limit else "")
