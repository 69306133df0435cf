"""The command line as a user meets it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from serving import free_port, is_ready, wait_until

from guardserve.cli import main
from guardserve.settings import ServeSettings

PROGRAM = Path(sys.executable).with_name("guardserve")


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command in this process; return its exit status and everything it printed."""
    result = CliRunner(env=env).invoke(main, arguments)
    return result.exit_code, result.output


def test_help_shows_every_setting_with_its_option_variable_and_default() -> None:
    """The help of serve is complete: a stranger can work from it."""
    status, text = run("serve", "--help")
    assert status == 0
    flat = " ".join(text.split())
    for name, field in ServeSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in flat
        assert f"GUARDSERVE_{name.upper()}" in flat
        assert field.description is not None
        assert field.description in flat
    for source in ("package.module:factory", "model.pt2", "model.pt", "demo"):
        assert source in flat


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (["--port", "99999"], {}, "--port (or GUARDSERVE_PORT) is '99999'"),
        (["--max-batch-size", "none"], {}, "--max-batch-size (or GUARDSERVE_MAX_BATCH_SIZE) is 'none'"),
        ([], {"GUARDSERVE_SHIFT_THRESHOLD": "-1"}, "GUARDSERVE_SHIFT_THRESHOLD) is '-1'"),
        (["--device", "cuda:99"], {}, "cuda:99"),
        (["--input-shape", "image=a,b"], {}, "image=a,b"),
        (["--shift-window", "32"], {}, "--shift-min-samples 64 is more than --shift-window 32"),
        (
            ["--device", "cuda:99"],
            {"GUARDSERVE_WEIGHTS": "", "GUARDSERVE_NAME": "", "GUARDSERVE_THREADS": ""},
            "cuda:99",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(arguments: list[str], env: dict[str, str], says: str) -> None:
    """The option, the variable and the value are named, and there is no traceback."""
    status, text = run("serve", "demo", *arguments, env=env)
    assert status == 1
    assert says in text
    assert "Traceback" not in text


def test_a_state_dict_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """A file of weights alone has no code to run, and the message says how to serve it."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    status, text = run("serve", str(path))
    assert status == 1
    assert "--weights" in text


def test_serve_stops_on_sigterm_and_frees_its_port() -> None:
    """The process serves, answers, and ends by itself when told to."""
    port = free_port()
    process = subprocess.Popen(
        [PROGRAM, "serve", "demo", "--port", str(port), "--log-level", "error", "--drain-delay", "0"]
    )
    try:
        wait_until(lambda: is_ready(f"http://127.0.0.1:{port}"))
        assert httpx.get(f"http://127.0.0.1:{port}/v2").json()["name"] == "guardserve"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_the_demo_ends_by_itself_and_shows_the_fall_and_the_alarm() -> None:
    """The demo with --once has status 0, accuracy falls, outputs stay finite, and the monitor says so."""
    done = subprocess.run(
        [PROGRAM, "demo", "--once", "--port", "0"], capture_output=True, text=True, timeout=120, check=True
    )
    clean = re.search(r"clean\W+256\W+([\d.]+)\W+finite\W+([\d.]+)\W+ok", done.stdout)
    shifted = re.search(r"brighter\W+256\W+([\d.]+)\W+finite\W+([\d.]+)\W+SHIFT after (\d+)", done.stdout)
    assert clean, done.stdout
    assert shifted, done.stdout
    assert float(clean[1]) > 0.95
    assert float(shifted[1]) < 0.5
    assert float(clean[2]) < 1 < float(shifted[2])
    assert int(shifted[3]) <= 8
    assert "first seen at blocks.0.norm: Input-level" in done.stdout
    assert re.search(r"metrics +http://127\.0\.0\.1:\d+/metrics", done.stdout)
    assert re.search(r"docs +http://127\.0\.0\.1:\d+/docs", done.stdout)
