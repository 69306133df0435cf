"""``torch.export`` archives that would run code: found before torch reads them.

An archive is a program, a JSON document, with its tensors. torch 2.13 runs code from one in more ways than unpickling.
Records flagged as pickles are unpickled, and so are sample inputs and old-style weights when a safe load fails; size
expressions go through ``sympify``, which evaluates them as Python; names become source code; types of containers are
imported. What torch.export writes for a plain model needs none of it, so all of it is refused. The records are read
through torch's own reader, because two zip readers can see two different archives in one file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from guardserve.exceptions import ModelLoadError, PickleRefusedError
from guardserve.loading.files import reason

if TYPE_CHECKING:
    from torch.export.pt2_archive import PT2ArchiveReader

_TRUST = "If you trust the file: --allow-pickle"

# every function that sizes are written with, and the keywords of their symbols
_WORDS = (
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod And Or Not Equality Unequality StrictLessThan LessThan "
    "StrictGreaterThan GreaterThan Piecewise ExprCondPair Abs floor ceiling FloorDiv ModularIndexing Where PythonMod "
    "CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv "
    "IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity "
    "True False true false positive nonnegative integer real precision evaluate"
)
_EXPRESSION = re.compile(rf"(?:\b(?:{_WORDS.replace(' ', '|')}|[a-z]{{1,4}}[0-9]+)\b|[-+*/%<>=!&|~(),.' 0-9])*")
_IDENTIFIER = re.compile(r"(?:[^\W\d]\w*)?")
# without a quote, a parenthesis or a space a text cannot become a call or a statement
_PLAIN = re.compile(r"[\w.:/+-]*|#\w+:[\w.:]+")
# what torch lets a program call although it imports the module, or creates the file, that a string names
_UNSAFE_OPERATOR = re.compile(r"custom_autograd_function|aten\.from_file")
# in the structure of inputs and outputs, whose keys can become names too: calls, the two containers whose types are
# imported by name, and the escapes that could disguise them
_UNSAFE_STRUCTURE = re.compile(r"[()]|__enum__|default_factory|\\u")


def refuse_code(file: IO[bytes], path: Path) -> None:
    """Refuse an archive from which torch would run code while it loads or calls the program.

    Args:
        file: The archive, open for reading; left at no particular position.
        path: What to call it in messages.

    Raises:
        PickleRefusedError: It holds a pickle of more than tensors.
        ModelLoadError: It is damaged, or a part of its program is not what an exporter writes.
    """
    from torch.export.pt2_archive import PT2ArchiveReader  # noqa: PLC0415 - slow to import, and rarely needed

    try:
        reader = PT2ArchiveReader(file)
        for name in reader.get_file_names():
            _refuse_record(reader, name, path)
    except ModelLoadError:
        raise
    except Exception as error:  # a damaged archive makes the zip and JSON readers raise anything
        raise ModelLoadError(f"{path} is a damaged torch.export archive: {reason(error)}") from error


def _refuse_record(reader: PT2ArchiveReader, name: str, path: Path) -> None:
    kind = name.lower()  # torch's reader finds a record whatever the case of its name
    if kind.startswith("data/aotinductor/"):
        raise ModelLoadError(f"{path} holds compiled code ({name}), which would run as it is loaded")
    if kind.startswith("models/"):
        program = json.loads(reader.read_bytes(name))
        for key, text in _suspicious(program["graph_module"]):
            raise ModelLoadError(f"{path} could run code: its {key} {text!r:.200} would become a part of it. {_TRUST}")
    elif kind.startswith(("data/weights/", "data/constants/", "data/sample_inputs/")):
        if kind.endswith(".json"):
            _refuse_payloads(json.loads(reader.read_bytes(name))["config"], path)
        elif kind.endswith(".pt"):
            _refuse_pickle(reader.read_bytes(name), name, path)


def _refuse_payloads(config: dict[str, dict[str, Any]], path: Path) -> None:
    """Refuse weights and constants that are anything else than the raw bytes of a tensor."""
    for key, payload in config.items():
        if payload["use_pickle"] is not False or not payload["path_name"].startswith(("weight_", "tensor_")):
            raise PickleRefusedError(
                f"{path} holds {key!r} as a pickle ({payload['path_name']}): loading it would run code from the file. "
                f"Export the model with plain tensors only, without tensor subclasses or custom objects. {_TRUST}"
            )


def _refuse_pickle(record: bytes, name: str, path: Path) -> None:
    try:
        if record:
            torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    except Exception as error:
        raise PickleRefusedError(
            f"{path} holds a pickle of more than tensors ({name}): loading it would run code from the file. "
            f"Export the model again with this torch, on plain tensors. {_TRUST}"
        ) from error


def _suspicious(graph_module: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a program that could act as code, each after the name of its field."""
    # an explicit stack: the depth of a document must not exhaust Python's
    pending: list[tuple[str, Any, bool]] = [("", graph_module, False)]
    while pending:
        key, value, in_node = pending.pop()
        if isinstance(value, dict):
            # metadata is text about the program, of which torch makes no code; nor does it of the keys of objects
            pending += [
                (name, child, in_node or name == "nodes") for name, child in value.items() if name != "metadata"
            ]
        elif isinstance(value, list):
            pending += [(key, child, in_node) for child in value]
        elif isinstance(value, str):
            # an operator's string arguments are quoted where they become code; those of the program itself are not
            quoted = in_node and key in {"as_string", "as_strings"}
            if not quoted and not _RULES.get(key, _PLAIN.fullmatch)(value):
                yield key, value


def _is_structure(text: str) -> bool:
    return not _UNSAFE_STRUCTURE.search(text)


def _is_target(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) and not _UNSAFE_OPERATOR.search(text)


def _is_operator(text: str) -> bool:
    """Tell whether a text names an operator: torch checks what a program calls, not what it passes on to be called."""
    found: object = torch
    for name in text.split(".")[1:]:
        found = getattr(found, name, None)
    return _is_target(text) and text.startswith("torch.ops.") and isinstance(found, (OpOverload, HigherOrderOperator))


_RULES: Mapping[str, Callable[[str], object]] = {
    "expr_str": _EXPRESSION.fullmatch,
    "name": _IDENTIFIER.fullmatch,
    "as_name": _IDENTIFIER.fullmatch,
    "forward_arg_names": _IDENTIFIER.fullmatch,
    "in_spec": _is_structure,
    "out_spec": _is_structure,
    "target": _is_target,
    "as_operator": _is_operator,
}
