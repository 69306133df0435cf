"""The image, built for real and run as it would be: ``make image-test``, as root.

No container engine takes part: buildah builds in a chroot, and the container is a chroot with mounts of its own.
Where the Dockerfile's base images are not in the store, Debian of the same release with Python stands in for both.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from serving import free_port, is_ready, wait_until

pytestmark = pytest.mark.image

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "image"
RELEASE = "bookworm"
BASES = (f"python:3.11-{RELEASE}", f"python:3.11-slim-{RELEASE}")
CONTEXT = (
    "Dockerfile",
    ".dockerignore",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    "native",
    "README.md",
    "LICENSE",
    "guardserve",
)
PACKAGES = "python3,python3-dev,python3-pip,python3-venv,gcc,libc6-dev,ca-certificates"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
STAGE_LIMIT = 1200
"""Seconds that one step of the build may take."""

RequireProgram = Callable[[str], str]


class Builder:
    """Builds images in a store of its own.

    Args:
        buildah: The program.
    """

    def __init__(self, buildah: str) -> None:
        storage = ("--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "--storage-driver", "overlay")
        self._command = (buildah, *storage)

    def __call__(self, *arguments: str) -> str:
        """Run buildah; return what it printed."""
        done = subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, timeout=STAGE_LIMIT, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def make_bases(self, debootstrap: str) -> None:
        """Have the Dockerfile's base images in the store, or what stands in for them."""
        missing = [
            f"localhost/{base}"
            for base in BASES
            if not json.loads(self("images", "--json", "--filter", f"reference=localhost/{base}") or "null")
        ]
        if not missing:
            return
        folder = WORK / "base"
        shutil.rmtree(folder, ignore_errors=True)
        command = [debootstrap, "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=STAGE_LIMIT, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        (folder / "usr/bin/python").symlink_to("python3")
        container = self("from", "scratch")
        self("add", "--quiet", container, str(folder), "/")
        self("commit", "--quiet", "--rm", container, missing[0])
        self("tag", *missing)
        shutil.rmtree(folder)

    def build(self, context: Path, tag: str) -> str:
        """Build a context; return the log."""
        options = ["--isolation", "chroot", "--pull-never", "--network", "host", "--format", "docker", "--layers"]
        if Path(CERTIFICATES).exists():
            options += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        for folder in _local_indexes():
            options += ["--volume", f"{folder}:{folder}:ro"]
        configuration = WORK / "pip.conf"
        configuration.write_text(_pip_configuration())
        return self("build", *options, "--secret", f"id=pip,src={configuration}", "--tag", tag, str(context))

    def configuration(self, image: str) -> dict[str, Any]:
        """Return the image's own configuration."""
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return found

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Mount an image's file system."""
        container = self("from", "--pull-never", image)
        try:
            yield Path(self("mount", container))
        finally:
            self("umount", container)
            self("rm", container)


def _pip_settings() -> dict[str, str]:
    """Read the settings of this machine's pip, which the build has to know too."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    pairs = (line.partition("=")[::2] for line in listed.stdout.splitlines())
    return {name.rpartition(".")[2]: value.strip("'\"") for name, value in pairs}


def _pip_configuration() -> str:
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in _pip_settings().items())


def _local_indexes() -> Iterator[Path]:
    """Yield the folders of this machine that pip installs from; an index lies beside the files that it lists."""
    settings = _pip_settings()
    for name in ("find-links", "index-url", "extra-index-url"):
        for place in settings.get(name, "").split():
            folder = Path(place.removeprefix("file://"))
            if folder.is_absolute() and folder.is_dir():
                yield folder.parent if place.startswith("file://") else folder


@pytest.fixture(scope="module")
def builder(require_program: RequireProgram) -> Builder:
    """Have the base images in a store."""
    builder = Builder(require_program("buildah"))
    debootstrap = require_program("debootstrap")
    if os.geteuid() != 0:
        pytest.skip("building without an engine needs root: make image-test as root")
    WORK.mkdir(parents=True, exist_ok=True)
    builder.make_bases(debootstrap)
    return builder


@pytest.fixture(scope="module")
def context() -> Path:
    """Copy what the Dockerfile builds from."""
    context = WORK / "context"
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir()
    for name in CONTEXT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, context)
    (context / "docker").mkdir()
    shutil.copy2(ROOT / "docker" / "healthcheck.py", context / "docker")
    return context


@pytest.fixture(scope="module")
def image(builder: Builder, context: Path) -> str:
    """Build the image."""
    builder.build(context, "guardserve")
    return "guardserve"


@pytest.fixture(scope="module")
def configuration(builder: Builder, image: str) -> dict[str, Any]:
    """Read its configuration."""
    return builder.configuration(image)


MOUNTS = """
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount -t tmpfs tmpfs "$0/tmp"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
exec "$@"
"""


def _program(name: str) -> str:
    return shutil.which(name) or name  # both come with every Debian


class Container:
    """The image's command, running.

    Args:
        root: The image's file system.
        configuration: The image's configuration.
        port: Where it is to listen, on loopback.
    """

    def __init__(self, root: Path, configuration: dict[str, Any], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = [*configuration["Env"], "GUARDSERVE_HOST=127.0.0.1", f"GUARDSERVE_PORT={port}"]
        self._chroot = ["chroot", f"--userspec={configuration['User']}", str(root), "/usr/bin/env", "-i", *environment]
        run = f'cd "{configuration["WorkingDir"]}" && exec "$@"'
        command = [*self._chroot, "sh", "-c", run, "sh", *configuration["Entrypoint"], *configuration["Cmd"]]
        self.process = subprocess.Popen([_program("unshare"), "--mount", "sh", "-euc", MOUNTS, str(root), *command])

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as the image's user."""
        enter = [_program("nsenter"), f"--target={self.process.pid}", "--mount"]
        return subprocess.run(
            [*enter, *self._chroot, *command], capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture(scope="module")
def container(builder: Builder, image: str, configuration: dict[str, Any]) -> Iterator[Container]:
    """Run the image until it is ready."""
    with builder.mounted(image) as root:
        container = Container(root, configuration, free_port())
        try:
            wait_until(lambda: container.process.poll() is not None or is_ready(container.url))
            yield container
        finally:
            container.process.kill()
            container.process.wait(30)


def test_it_serves_the_demo(container: Container) -> None:
    """One digit in, ten finite logits out; its samples are counted."""
    tensor = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
    answer = httpx.post(f"{container.url}/v2/models/digits_cnn/infer", json={"inputs": [tensor]}, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["outputs"][0]["data"]) == 10
    assert httpx.get(f"{container.url}/ui", trust_env=False).status_code == 200
    assert "guardserve_samples_total" in httpx.get(f"{container.url}/metrics", trust_env=False).text


def test_its_own_health_check_succeeds(container: Container, configuration: dict[str, Any]) -> None:
    """The command of HEALTHCHECK, run inside as the engine does."""
    kind, *command = configuration["Healthcheck"]["Test"]
    assert kind == "CMD"
    done = container.run(*command)
    assert done.returncode == 0, done.stderr


def test_it_is_nobody_and_can_write_nowhere_but_in_tmp(container: Container, configuration: dict[str, Any]) -> None:
    """The process has the image's numeric user and no capability; the root file system is read-only."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{container.process.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split() == [configuration["User"].split(":")[0]] * 4
    assert int(status["CapEff"], 16) == 0
    assert "Read-only file system" in container.run("touch", "/venv/it").stderr
    assert container.run("touch", "/tmp/it").returncode == 0  # noqa: S108 - the tmpfs inside


def test_it_brings_nothing_of_the_build(container: Container) -> None:
    """No pip cache and no secret is left, torch is the build for the CPU, and what is compiled was compiled."""
    assert container.run("ls", "/var/cache/pip").stdout == ""
    assert container.run("cat", "/etc/pip.conf").stdout == ""
    assert "+cpu" in container.run("python", "-c", "import torch; print(torch.__version__)").stdout
    assert container.run("python", "-c", "import guardserve.native").returncode == 0


def test_it_stops_on_its_signal_within_the_drain_time(container: Container, configuration: dict[str, Any]) -> None:
    """SIGTERM ends it with status 0, in less time than compose gives it."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    grace = float(services["guardserve"]["stop_grace_period"].rstrip("s"))
    started = time.monotonic()
    container.process.send_signal(getattr(signal, configuration["StopSignal"]))
    assert container.process.wait(grace) == 0
    assert time.monotonic() - started < grace


def test_a_change_of_code_installs_no_dependency_again(builder: Builder, context: Path, image: str) -> None:
    """The second build takes the steps that install torch and the rest from its cache."""
    before = set(builder.configuration(image)["Env"])
    with (context / "guardserve" / "__init__.py").open("a") as code:
        code.write("# a change\n")
    log = builder.build(context, "guardserve-changed")
    steps = log.split("STEP ")
    cached = [step for step in steps if "Using cache" in step]
    assert any("install --constraint constraints.txt torch" in step for step in cached), log[-3000:]
    assert any("--requirement requirements.txt" in step for step in cached)
    assert not any("--no-deps --prefix /package" in step for step in cached), "the code itself is new"
    assert set(builder.configuration("guardserve-changed")["Env"]) == before
