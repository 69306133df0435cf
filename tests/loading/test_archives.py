"""Tests of guardserve.loading.archives.

Each attack comes with its control: the same file run by torch.export.load alone does what the payload says, which is
to make a folder. So a refusal here is never a refusal of something that was harmless anyway.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from guardserve.exceptions import ModelLoadError, PickleRefusedError
from guardserve.loading import load_model
from guardserve.loading.archives import refuse_code

Records = dict[str, bytes]
Attack = Callable[[Records, Path], None]

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"


class Payload:
    """Pickles to a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.mkdir, (self.marker,)


def read(data: bytes) -> Records:
    """Read the records of an archive, but for those that the writer adds itself."""
    reader = PT2ArchiveReader(io.BytesIO(data))
    own = ("version", "byteorder", ".data/")
    return {name: reader.read_bytes(name) for name in reader.get_file_names() if not name.startswith(own)}


def write(path: Path, records: Records) -> Path:
    """Write an archive of some records."""
    with PT2ArchiveWriter(str(path)) as writer:
        for name, data in records.items():
            writer.write_bytes(name, data)
    return path


def run_unsafely(path: Path) -> None:
    """Load and call a program as torch does, whatever comes of it."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(path).module()(torch.zeros(2, 3, 8, 8))


def saved(content: object) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def edit(records: Records, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON record."""
    document = json.loads(records[name])
    change(document)
    records[name] = json.dumps(document).encode()


def rename(records: Records, old: str, new: str) -> None:
    """Give a value of the program another name, wherever it is named."""
    records[PROGRAM] = records[PROGRAM].replace(json.dumps(old).encode(), json.dumps(new).encode())


def code(marker: Path) -> str:
    """Return an expression that makes a folder."""
    return f"__import__('os').mkdir('{marker}')"


def first_node(**fields: Any) -> Callable[[Any], None]:
    """Put a node before all others, whose output looks like the input image."""

    def change(program: Any) -> None:
        graph = program["graph_module"]["graph"]
        graph["tensor_values"]["made"] = graph["tensor_values"]["image"]
        outputs = [{"as_tensor": {"name": "made"}}]
        node = {"name": "made", "metadata": {}, "is_hop_single_tensor_return": None, "outputs": outputs, **fields}
        graph["nodes"].insert(0, node)

    return change


def argument(name: str, **value: Any) -> dict[str, Any]:
    """Return a positional argument of a node."""
    return {"name": name, "arg": value, "kind": 1}


def payload(path_name: str, *, use_pickle: bool = True) -> dict[str, Any]:
    """Return the description of a weight or a constant."""
    return {"path_name": path_name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}


def pickled_weight(records: Records, marker: Path) -> None:
    """Flag a weight as pickled."""
    edit(records, WEIGHTS, lambda weights: weights["config"].update({"conv.weight": payload("weight_99")}))
    records["data/weights/weight_99"] = saved(Payload(marker))


def pickled_constant(records: Records, marker: Path) -> None:
    """Flag a constant as pickled."""
    edit(records, CONSTANTS, lambda constants: constants["config"].update(evil=payload("tensor_0")))
    records["data/constants/tensor_0"] = saved(Payload(marker))


def opaque_constant(records: Records, marker: Path) -> None:
    """Make a constant an opaque object."""
    edit(records, CONSTANTS, lambda constants: constants["config"].update(evil=payload("opaque_obj_0")))
    records["data/constants/opaque_obj_0"] = pickle.dumps(Payload(marker))


def sample_inputs(records: Records, marker: Path) -> None:
    """Make the sample inputs an object that a safe load refuses, whereupon torch loads it unsafely."""
    records[SAMPLE_INPUTS] = saved(Payload(marker))


def sample_inputs_in_capitals(records: Records, marker: Path) -> None:
    """Hide them from a reader that minds the case of names, as torch's does not."""
    del records[SAMPLE_INPUTS]
    records["DATA/Sample_Inputs/MODEL.PT"] = saved(Payload(marker))


def legacy_weights(records: Records, marker: Path) -> None:
    """Add weights as older torch stored them, which come before the new ones."""
    records["data/weights/model.pt"] = saved(Payload(marker))


def legacy_constants(records: Records, marker: Path) -> None:
    """Add constants as older torch stored them."""
    records["data/constants/model.pt"] = saved(Payload(marker))


def size_expression(records: Records, marker: Path) -> None:
    """Put code before the symbol of a size."""
    records[PROGRAM] = records[PROGRAM].replace(b"Symbol('s", f"{code(marker)} or Symbol('s".encode(), 1)


def value_name(records: Records, marker: Path) -> None:
    """Give an input a name with a default value, which Python evaluates as it defines the function."""
    rename(records, "image", f"image={code(marker)}")
    edit(
        records,
        PROGRAM,
        lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["image"]
        ),
    )


def imported_type(records: Records, marker: Path) -> None:
    """Name a module to import as the home of an enum, which is a key of the outputs."""
    (marker.parent / "evil_enum.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")

    def change(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        key = {"__enum__": True, "fqn": "evil_enum:Key", "name": "x"}
        protocol, leaf = json.loads(signature["out_spec"])
        spec = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}
        signature["out_spec"] = json.dumps([protocol, spec])

    edit(records, PROGRAM, change)


def importing_call(records: Records, marker: Path) -> None:
    """Call torch's function that imports the module of a class by its name."""
    (marker.parent / "evil_class.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    node = {
        "target": "torch.export.custom_ops._call_custom_autograd_function_in_pre_dispatch",
        "inputs": [argument("", as_string="evil_class.Function")],
    }
    edit(records, PROGRAM, first_node(**node))


def written_file(records: Records, marker: Path) -> None:
    """Call torch's operator that makes a file where there is none."""
    size = [argument("shared", as_bool=True), argument("size", as_int=8)]
    node = {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [argument("filename", as_string=str(marker)), *size],
    }
    edit(records, PROGRAM, first_node(**node))


def qualified_name(records: Records, marker: Path) -> None:
    """Close the quotes around a part of the name of a buffer, where the generated code looks it up."""
    call = code(marker).replace("'", '"').replace('__import__("os").mkdir', 'getattr(__import__("os"),"mkdir")')
    evil = f'training"),{call},("'
    for name in (PROGRAM, WEIGHTS):
        records[name] = records[name].replace(b'"norm.running_mean"', json.dumps(f"{evil}.running_mean").encode())


PICKLES = [
    pickled_weight,
    pickled_constant,
    opaque_constant,
    sample_inputs,
    sample_inputs_in_capitals,
    legacy_weights,
    legacy_constants,
]
PROGRAMS = [size_expression, value_name, imported_type, importing_call, written_file, qualified_name]


@pytest.mark.parametrize("attack", [*PICKLES, *PROGRAMS], ids=lambda attack: attack.__name__)
def test_an_archive_that_runs_code_is_refused_and_does_not_run(
    attack: Attack, exported_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The payload of a refused archive has not run; the same archive given to torch runs it."""
    monkeypatch.syspath_prepend(tmp_path)
    marker = tmp_path / "owned"
    records = read(exported_bytes)
    attack(records, marker)
    path = write(tmp_path / "evil.pt2", records)
    error = PickleRefusedError if attack in PICKLES else ModelLoadError
    with pytest.raises(ModelLoadError, match=r"(could|would) run code") as caught:
        load_model(str(path), device="cpu")
    assert type(caught.value) is error
    assert "If you trust the file: --allow-pickle" in str(caught.value)
    assert not marker.exists()
    run_unsafely(path)
    assert marker.exists()


def test_the_guards_of_an_archive_do_not_run(exported_bytes: bytes, tmp_path: Path) -> None:
    """They are text that torch would make code of; the program is loaded and called without them."""
    marker = tmp_path / "owned"
    records = read(exported_bytes)
    edit(records, PROGRAM, lambda program: program.update(guards_code=[f"{code(marker)} is None"]))
    path = write(tmp_path / "guarded.pt2", records)
    load_model(str(path), device="cpu").module(torch.zeros(2, 3, 8, 8))
    assert not marker.exists()
    run_unsafely(path)
    assert marker.exists()


def test_an_archive_runs_where_pickle_is_allowed(exported_bytes: bytes, tmp_path: Path) -> None:
    """The user has said that they trust the file."""
    marker = tmp_path / "owned"
    records = read(exported_bytes)
    size_expression(records, marker)
    loaded = load_model(str(write(tmp_path / "trusted.pt2", records)), device="cpu", allow_pickle=True)
    assert loaded.module(torch.zeros(2, 3, 8, 8)).shape == (2, 2)
    assert marker.exists()


def test_an_untouched_copy_is_accepted(exported_bytes: bytes, tmp_path: Path) -> None:
    """What refuses the edited archives is the edit."""
    path = write(tmp_path / "copy.pt2", read(exported_bytes))
    assert load_model(str(path), device="cpu").inputs[0].shape == (-1, 3, 8, 8)


def test_weights_as_older_torch_stored_them_are_accepted(exported_bytes: bytes, tmp_path: Path, tiny: Any) -> None:
    """A pickle of nothing but tensors is safe, and read as such."""
    records = read(exported_bytes)
    records["data/weights/model.pt"] = saved(dict(tiny.state_dict(keep_vars=True)))
    path = write(tmp_path / "older.pt2", records)
    image = torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(load_model(str(path), device="cpu").module(image), tiny(image))


@pytest.mark.parametrize(
    "expression",
    [
        "s0 + 1",
        "Symbol('s40', positive=True, integer=True)",
        "Add(Mul(Integer(2), FloorDiv(Symbol('u0', integer=True), Integer(3))), Integer(-1))",
        "Max(1, s0//2)**2",
        "Piecewise((1, StrictLessThan(s1, 2)), (0.5, True))",
    ],
)
def test_size_arithmetic_is_accepted(expression: str, exported_bytes: bytes, tmp_path: Path) -> None:
    """The expressions that sizes are written in pass the inspection."""
    inspect_with(expression, exported_bytes, tmp_path)


@pytest.mark.parametrize(
    "expression",
    [
        "open('x', 'w')",
        "eval('1')",
        "sympify('1')",
        "s0.__class__",
        "s0.free_symbols",
        "getattr(s0, 's1')",
        "Symbol('s0').name",
        "[s0 for s0 in s1]",
        "lambda s0: s0",
        "Symbol('\\x6fpen')",
        'Symbol("s0")',
        "__import__",
        "s0\n+ 1",
        "s0Symbol",
        "1if s0 else 2",
    ],
)
def test_anything_but_size_arithmetic_is_refused(expression: str, exported_bytes: bytes, tmp_path: Path) -> None:
    """No other function, attribute, string or syntax reaches sympify."""
    with pytest.raises(ModelLoadError, match=r"its expr_str .* would become a part of it"):
        inspect_with(expression, exported_bytes, tmp_path)


def inspect_with(expression: str, exported_bytes: bytes, tmp_path: Path) -> None:
    """Inspect an archive with a size of its own."""
    records = read(exported_bytes)
    sizes = [{"as_expr": {"expr_str": expression, "hint": None}}]
    edit(
        records,
        PROGRAM,
        lambda program: program["graph_module"]["graph"]["tensor_values"]["image"].update(sizes=sizes),
    )
    with write(tmp_path / "sizes.pt2", records).open("rb") as file:
        refuse_code(file, Path("sizes.pt2"))


@pytest.mark.parametrize(
    ("target", "accepted"),
    [
        ("torch.ops.aten.add.Tensor", True),
        ("torch.ops.higher_order.cond", True),
        ("torch.os.system", False),
        ("torch.ops.load_library", False),
        ("torch.ops.import_module", False),
        ("torch.ops.aten.from_file.default", False),
        ("os.system", False),
        ("_operator.methodcaller", False),
        ("torch.ops.aten.add.Tensor()", False),
    ],
)
def test_only_operators_are_passed_to_operators(
    target: str, accepted: bool, exported_bytes: bytes, tmp_path: Path
) -> None:
    """Torch checks what a program calls, but not what it hands on to be called."""
    records = read(exported_bytes)
    node = {"target": "torch.ops.higher_order.wrap", "inputs": [argument("", as_operator=target)]}
    edit(records, PROGRAM, first_node(**node))
    outcome = (
        contextlib.nullcontext()
        if accepted
        else pytest.raises(ModelLoadError, match=r"its as_operator .* would become")
    )
    with write(tmp_path / "passed.pt2", records).open("rb") as file, outcome:
        refuse_code(file, Path("passed.pt2"))


def test_an_operators_string_may_hold_anything(exported_bytes: bytes, tmp_path: Path) -> None:
    """It is quoted where it becomes code: the text of an assertion has quotes and parentheses."""
    records = read(exported_bytes)
    node = {"target": "torch.ops.aten._assert_async.msg", "inputs": [argument("msg", as_string="Eq(u0, 1) isn't so")]}
    edit(records, PROGRAM, first_node(**node))
    with write(tmp_path / "string.pt2", records).open("rb") as file:
        refuse_code(file, Path("string.pt2"))


def test_compiled_code_is_refused(exported_bytes: bytes, tmp_path: Path) -> None:
    """An AOTInductor package runs as it is loaded, and has no graph to watch; also by torch's own reader alone."""
    records = read(exported_bytes) | {"data/aotinductor/model/model.so": b"\x7fELF"}
    path = write(tmp_path / "compiled.pt2", records)
    with pytest.raises(ModelLoadError, match=r"is an AOTInductor package.*serve the program it was compiled from"):
        load_model(str(path), device="cpu", allow_pickle=True)
    with path.open("rb") as file, pytest.raises(ModelLoadError, match="holds compiled code"):
        refuse_code(file, path)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("in_spec", '[1, {"context": "[\\"image=print()\\"]"}]'),
        ("out_spec", '[1, {"context": "[{\\"default_factory_module\\": \\"os\\"}]"}]'),
        ("in_spec", '[1, {"context": "[{\\"__\\\\u0065num__\\": true}]"}]'),
        ("forward_arg_names", ["image=print()"]),
        ("forward_arg_names", ["image.name"]),
        ("forward_arg_names", ["import os"]),
    ],
)
def test_the_names_of_arguments_are_nothing_but_names(
    field: str, text: object, exported_bytes: bytes, tmp_path: Path
) -> None:
    """Names, and keys that can become names, hold no code, and no escapes in which some could hide."""
    records = read(exported_bytes)
    edit(
        records,
        PROGRAM,
        lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update({field: text}),
    )
    path = write(tmp_path / "names.pt2", records)
    with path.open("rb") as file, pytest.raises(ModelLoadError, match=f"its {field} .* would become a part of it"):
        refuse_code(file, path)


@pytest.mark.parametrize("record", [PROGRAM, WEIGHTS, CONSTANTS])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"config": 3}', b"\xff\xfe", b"[" * 100_000],
    ids=lambda content: content[:9],
)
def test_a_record_that_is_no_such_document_is_refused(
    record: str, content: bytes, exported_bytes: bytes, tmp_path: Path
) -> None:
    """The error says that the archive is damaged, not what a JSON reader tripped over."""
    path = write(tmp_path / "damaged.pt2", read(exported_bytes) | {record: content})
    with pytest.raises(ModelLoadError, match=f"{path} (is a damaged torch.export archive|cannot be loaded)"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize("record", [PROGRAM, WEIGHTS, CONSTANTS, SAMPLE_INPUTS, "archive_version"])
def test_an_archive_that_lacks_a_record_is_refused(record: str, exported_bytes: bytes, tmp_path: Path) -> None:
    """Whatever is missing, the error names the file."""
    records = read(exported_bytes)
    del records[record]
    if record == "archive_version":
        records[record] = b"999"  # the writer adds what is missing
    path = write(tmp_path / "incomplete.pt2", records)
    with pytest.raises(ModelLoadError, match=f"{path} (is a damaged|cannot be loaded|holds 0 programs)"):
        load_model(str(path), device="cpu")
