"""A real server on loopback for the tests: in a thread, or as the command that users run."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn

from guardserve import watch
from guardserve.loading import LoadedModel
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.limits import Limits
from guardserve.signature import TensorSpec

TIMEOUT = 60.0

watch.PATIENCE = TIMEOUT  # however busy the machine is, a scrape shows what was served before it


def loaded(module: nn.Module, *inputs: TensorSpec, name: str = "net") -> LoadedModel:
    """Wrap a module as if it had been loaded; by default with one float input ``x`` of three features."""
    specs = inputs or (TensorSpec("x", torch.float32, (-1, 3)),)
    return LoadedModel(
        name=name,
        module=module,
        inputs=specs,
        platform="pytorch_eager",
        device=torch.device("cpu"),
        source="a test",
    )


@contextmanager
def serving(module: nn.Module, *inputs: TensorSpec, **limits: Any) -> Iterator[httpx.Client]:
    """Serve a module in a thread; give a client once its start-up probe has ended, passed or not."""
    runtime = Runtime(loaded(module, *inputs))
    app = create_app(runtime, limits=Limits(**{"max_batch_size": 8, "max_body_size": 2**20, **limits}))
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client:
        wait_until(lambda: runtime.failure is None or "failed" in runtime.failure)
        yield client


@contextmanager
def command(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    verify: ssl.SSLContext | None = None,
) -> Iterator[str]:
    """Run ``guardserve`` with a free port until the block ends; give its URL once it is ready.

    It is an https one if there is a context to verify that with.
    """
    port = free_port()
    program = Path(sys.executable).with_name("guardserve")
    process = subprocess.Popen([program, *arguments, "--port", str(port)], env=env, cwd=cwd)
    url = f"{'http' if verify is None else 'https'}://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_ready(url, verify))
        if process.poll() is not None:
            raise RuntimeError(f"guardserve ended with status {process.returncode}")
        yield url
    finally:
        process.terminate()
        process.wait(TIMEOUT)


@contextmanager
def listening(server: HTTPServer) -> Iterator[None]:
    """Have a server of the standard library answer in a thread until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def is_ready(url: str, verify: ssl.SSLContext | None = None) -> bool:
    """Tell whether a server answers that it is ready."""
    try:
        context = True if verify is None else verify
        return httpx.get(f"{url}/v2/health/ready", trust_env=False, verify=context).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_until(condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
    """Poll a condition until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.05)


def metric(client: httpx.Client, sample: str) -> float:
    """Read one sample from ``/metrics``; it is absent as NaN."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(sample + " "):
            return float(line.rsplit(" ", 1)[1])
    return float("nan")
