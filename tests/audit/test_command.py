"""``guardserve audit``: exit status, options and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit.models import convolutional
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

from guardserve.audit.registry import RULES
from guardserve.cli import main


def sound() -> nn.Module:
    """Build a sound model."""
    return convolutional()[0]


def fresh() -> nn.Module:
    """Build a model whose statistics were never updated: a warning."""
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).eval()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this module one that a user could name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def run(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["audit", *arguments])


def test_findings_are_status_1_and_none_is_0() -> None:
    """The level at which findings count can be lowered to warnings."""
    assert run("demo").exit_code == 1
    assert run("test_command:sound").exit_code == 0
    assert run("test_command:fresh").exit_code == 0
    assert run("test_command:fresh", "--fail-on", "warning").exit_code == 1
    assert run("test_command:fresh", "--fail-on", "warning", "--ignore", "BN004").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.pt",), "Error: there is no file 'none.pt'"),
        (("test_command:missing",), "Error: test_command:missing: test_command has no attribute 'missing'"),
        (("demo", "--select", "BN999"), "Error: there is no rule 'BN999': the rules are BN001"),
        (("demo", "--example", "none.npy"), "Error: none.npy is not a readable .npy, .npz or .safetensors file"),
        (("demo", "--input-shape", "1,x"), "Error: input shape '1,x'"),
        (("demo", "--device", "abacus"), "Error: device 'abacus' is not known"),
        (("demo", "--format", "pdf"), "Invalid value for '--format'"),
        ((), "Missing argument 'MODEL'"),
    ],
)
def test_what_keeps_it_from_running_is_status_2_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    """No traceback, and the message says what was wrong."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_example_that_does_not_run_is_told_after_the_report(tmp_path: Path) -> None:
    """A pipeline with the wrong example must not pass for one that probed the model; findings come first."""
    result = run("test_command:sound", "--input-shape", "5,12,12")
    assert result.exit_code == 2
    assert "not known to be safe: the example was not run" in result.stdout
    assert "Error: no probe could run: it does not run on the example: RuntimeError" in result.stderr
    assert run("demo", "--input-shape", "5,8,8").exit_code == 1
    np.save(tmp_path / "rows.npy", np.zeros((0, 3, 12, 12), np.float32))
    result = run("test_command:sound", "--example", str(tmp_path / "rows.npy"))
    assert (result.exit_code, "first axis is the batch" in result.stderr) == (2, True)


def test_an_example_file_makes_every_probe_possible(tmp_path: Path) -> None:
    """Real rows, and nothing is left unchecked."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32))
    result = run("test_command:sound", "--example", str(tmp_path / "rows.npy"), "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ran"] == sorted(RULES)


@pytest.mark.parametrize("style", ["text", "json", "sarif", "github"])
def test_every_format_names_the_finding(style: str) -> None:
    """On standard output alone, without terminal escapes."""
    result = run("demo", "--format", style)
    assert "BN001" in result.stdout
    assert "\x1b" not in result.stdout
    assert not result.stderr


def test_rules_are_selected_by_comma_or_by_repeating() -> None:
    """Both ways, and by what codes start with."""
    document: dict[str, Any] = json.loads(
        run("demo", "--format", "json", "--select", "BN001,BN003", "--select", "BN1", "--ignore", "BN106").stdout
    )
    assert document["ran"] == ["BN001", "BN003", "BN101", "BN102", "BN103", "BN104", "BN105"]


def test_a_state_dict_and_its_factory(tmp_path: Path) -> None:
    """The numbers alone, or in the model."""
    model = sound()
    model.get_buffer("4.running_mean")[0] = float("nan")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for arguments in (
        (str(tmp_path / "w.safetensors"),),
        (str(tmp_path / "w.pt"),),
        ("test_command:sound", "--weights", str(tmp_path / "w.pt")),
    ):
        result = run(*arguments)
        assert (result.exit_code, "BN005" in result.stdout) == (1, True)


@pytest.mark.parametrize("code", sorted(RULES))
def test_explain_prints_the_page(code: str) -> None:
    """Without a model."""
    result = run("--explain", code)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"## {code} {RULES[code].name}\n")


def test_explain_of_an_unknown_rule_lists_the_known_ones() -> None:
    """With status 2."""
    result = run("--explain", "BN555")
    assert (result.exit_code, "BN001, BN002" in result.output) == (2, True)


def test_the_options_are_those_documented() -> None:
    """Each option of the command is in the document, and the other way round."""
    document = (Path(__file__).parents[2] / "docs/audit.md").read_text().partition("<!-- rules -->")[0]
    offered = {option for parameter in main.commands["audit"].params for option in parameter.opts if option[:2] == "--"}
    assert {option for option in offered if f"`{option}" not in document} == set()
