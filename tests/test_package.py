"""The package as a whole: its public names, what importing it loads, and that imports go downward only."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import guardserve

ROOT = Path(guardserve.__file__).parent

# from the ground up; rooms of one level do not import each other
LEVELS = (
    {"exceptions", "native"},
    {"signature", "batchnorm", "stats", "nonfinite", "walks", "identity", "fingerprints", "symbolic", "compiled"},
    {"graphs", "inlets"},
    {"modes", "buffers", "decoration", "gradients", "outputs"},
    {"tracing"},
    {"fusion", "guard", "loading", "settings", "observation", "logs", "traces", "client"},
    {"detection"},
    {"monitor"},
    {"audit"},
    {"runtime"},
    {"engine"},
    {"totals"},
    {"metrics"},
    {"traffic"},
    {"watch"},
    {"page"},
    {"service"},
    {"rpc", "workers"},
    {"demo"},
    {"cli", "pytest_plugin"},
)


LAZY = {"AsyncClient", "Client"}
"""Public names that are imported when they are asked for."""


def test_all_is_exactly_the_public_names() -> None:
    """Everything importable from the root is meant to be, and is listed in order."""
    public = {
        name for name, value in vars(guardserve).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | LAZY | {"__version__"} == set(guardserve.__all__)
    assert guardserve.__all__ == sorted(guardserve.__all__)


def test_importing_it_loads_torch_and_nothing_of_the_web_metrics_or_command_line() -> None:
    """A team that imports EvalGuard into its own server gets no second server."""
    code = "import sys, guardserve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    unwanted = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "click", "httpx", "rich", "orjson"}
    assert not loaded & unwanted
    assert "torch._dynamo" not in done.stdout.split(), "the compiler takes seconds and 100 MB"


def test_the_clients_are_imported_when_they_are_asked_for() -> None:
    """And they load no server."""
    code = f"import sys, guardserve; [getattr(guardserve, name) for name in {LAZY}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "httpx" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "prometheus_client"}
    with pytest.raises(AttributeError, match="Clinet"):
        _ = guardserve.Clinet


def room(module: str) -> str:
    """Return the room of a module: the first part of its name below the package."""
    return module.removeprefix("guardserve.").split(".")[0]


def imports(path: Path) -> set[str]:
    """Return the rooms that a file imports at its top level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guardserve"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "guardserve" else []
            found |= {room(name) for name in names or [node.module or ""]}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    """Every module belongs to a room on a known level, and imports only from below or from its own room."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    level = next(i for i, rooms in enumerate(LEVELS) if own in rooms)
    below = set().union(*LEVELS[:level])
    assert imports(path) - {own} <= below


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also within a room: whichever is imported first works."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found = graph[".".join(parts).removesuffix(".__init__")] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    TopologicalSorter({name: found & graph.keys() - {name} for name, found in graph.items()}).prepare()
