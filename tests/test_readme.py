"""The README is true: its Python runs, its table of metrics and its options are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from guardserve.cli import main
from guardserve.metrics import METRICS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each block may use what those before it made; what a comment says is printed is printed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own README
    promised = re.findall(r"^print\(.*\) +# (.+)$", "\n".join(blocks), re.MULTILINE)
    assert promised
    assert capsys.readouterr().out.split("\n")[:-1] == promised


def test_the_table_of_metrics_is_the_codes() -> None:
    """Every metric has its row, and every row its metric."""
    rows = re.findall(r"^\| `(guardserve_\w+)` \((\w+)\) \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    assert {name: (kind, labels, text) for name, kind, labels, text in rows} == {
        name: (d.kind, ", ".join(d.labels), d.help) for name, d in METRICS.items()
    }


def test_every_option_and_command_in_it_exists() -> None:
    """An option that the README names is one of the help page of its command."""
    for command, rest in re.findall(r"\$ guardserve (\w+)(.*)", README):
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0, f"guardserve {command} does not exist"
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in result.output
