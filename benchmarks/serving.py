"""Requests a second beside a server written by hand, and beside MLServer where it is installed.

    python benchmarks/serving.py [--models tiny,resnet] [--connections 1,8,32] [--seconds 4] [--rounds 3]

Every server runs alone on one processor and the load generator, wrk, on another. guardserve has all of its safeguards
on: guard, monitor on every layer and request, check for non-finite values, metrics. "x raw" is the ratio to the
hand-written server that takes and gives raw bytes, in the same round; medians of the rounds. Needs Linux with two
processors, and wrk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from serving_models import SHAPES

HERE = Path(__file__).parent
READY_TIMEOUT = 90.0
WRK, TASKSET = shutil.which("wrk") or "", shutil.which("taskset") or ""

SCRIPT = """
wrk.method = "POST"
local file = io.open("BODY", "rb")
wrk.body = file:read("*a")
file:close()
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format("\\nRESULT %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(99),
    errors.status + errors.read + errors.timeout))
end
"""

MLSERVER = """
import serving_models, torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Bench(MLModel):
    async def load(self):
        torch.set_num_threads(1)
        self.net = serving_models.MODEL()
        return True

    async def predict(self, payload):
        x = torch.from_numpy(NumpyCodec.decode_input(payload.inputs[0]))
        with torch.inference_mode():
            y = self.net(x.float()).numpy()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", y)])
"""

UVICORN = ("-m", "uvicorn", "--factory", "serving_models:plain_MODEL", "--port", "PORT", "--no-access-log")
GUARDSERVE = ("-c", "from guardserve.cli import main; main()", "serve", "serving_models:MODEL", "--port", "PORT")
OPTIONS = ("--name", "bench", "--threads", "1", "--log-level", "error")
INFER, READY = "/v2/models/bench/infer", "/v2/health/ready"


@dataclass(frozen=True)
class Peer:
    """A server and one form of request to it.

    Attributes:
        name: What the table calls it.
        command: How Python starts it; MODEL, PORT and FOLDER are filled in.
        ready: Path that answers 200 once it is ready.
        path: Path of inference.
        form: ``"nested"``, ``"raw"``, ``"oip"`` or ``"oip-binary"``.
    """

    name: str
    command: tuple[str, ...]
    ready: str
    path: str
    form: str


PEERS = (
    Peer("by hand, raw", (*UVICORN, "--log-level", "warning"), "/ready", "/raw", "raw"),
    Peer("by hand, JSON", (*UVICORN, "--log-level", "warning"), "/ready", "/json", "nested"),
    Peer("MLServer, JSON", ("-m", "mlserver", "start", "FOLDER"), "/v2/models/bench/ready", INFER, "oip"),
    Peer("guardserve, JSON", (*GUARDSERVE, *OPTIONS), READY, INFER, "oip"),
    Peer("guardserve, binary", (*GUARDSERVE, *OPTIONS), READY, INFER, "oip-binary"),
    Peer("guardserve --fuse, binary", (*GUARDSERVE, *OPTIONS, "--fuse"), READY, INFER, "oip-binary"),
)


def request(form: str, shape: tuple[int, ...]) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a request for one sample."""
    x = np.random.default_rng(0).standard_normal((1, *shape)).astype("<f4")
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    if form == "raw":
        return x.tobytes(), {"Content-Type": "application/octet-stream"}
    if form == "nested":
        return json.dumps({"data": x.tolist()}).encode(), {"Content-Type": "application/json"}
    if form == "oip":
        inputs = [{**tensor, "data": x.ravel().tolist()}]
        return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
    entry = {**tensor, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"parameters": {"binary_data_output": True}, "inputs": [entry]}).encode()
    return head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@contextmanager
def running(peer: Peer, model: str) -> Iterator[tuple[str, int]]:
    """Run a server on the first processor; give its address and its process id once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        fill = {"MODEL": model, "PORT": str(port), "FOLDER": folder}
        if "mlserver" in peer.command:
            _configure_mlserver(Path(folder), model, port)
        command = [re.sub("MODEL|PORT|FOLDER", lambda match: fill[match[0]], part) for part in peer.command]
        environment = {**os.environ, "PYTHONPATH": f"{HERE}:{folder}", "OMP_NUM_THREADS": "1"}
        pinned = [TASKSET, "-c", "0", sys.executable, *command]
        process = subprocess.Popen(pinned, env=environment, cwd=folder)  # noqa: S603 - our own command
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + READY_TIMEOUT
            while not _answers(url + peer.ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{peer.name} did not become ready")
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(30)


def _configure_mlserver(folder: Path, model: str, port: int) -> None:
    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}
    (folder / "settings.json").write_text(json.dumps(settings))
    served = {"name": "bench", "implementation": "peer.Bench", "max_batch_size": 8, "max_batch_time": 0.002}
    (folder / "model-settings.json").write_text(json.dumps(served))
    (folder / "peer.py").write_text(MLSERVER.replace("MODEL", model))


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def load(url: str, body: tuple[bytes, dict[str, str]], connections: int, seconds: float) -> tuple[float, float]:
    """Send requests from the second processor; return requests a second and the 99th percentile in milliseconds."""
    with tempfile.TemporaryDirectory() as name:
        path, script = Path(name, "body"), Path(name, "request.lua")
        path.write_bytes(body[0])
        headers = "".join(f'wrk.headers["{key}"] = "{value}"\n' for key, value in body[1].items())
        script.write_text(SCRIPT.replace("BODY", str(path)) + headers)
        options = ("-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(script), url)
        command = [TASKSET, "-c", "1", WRK, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    if found is None or int(found[4]):
        raise RuntimeError(f"{url} failed: {done.stdout}{done.stderr}")
    return int(found[1]) / (int(found[2]) / 1e6), int(found[3]) / 1000


def resident(pid: int) -> float:
    """Return a process's resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


Measured = dict[tuple[str, int, str], list[tuple[float, float, float, float]]]


def measure(models: Sequence[str], connections: Sequence[int], seconds: float, rounds: int) -> Measured:
    """Measure every peer in turn, each started afresh; per model, connections and peer one entry for each round."""
    peers = [peer for peer in PEERS if "mlserver" not in peer.command or importlib.util.find_spec("mlserver")]
    measured: Measured = defaultdict(list)
    for _ in range(rounds):
        for model in models:
            raw: dict[int, float] = {}
            for peer in peers:
                with running(peer, model) as (url, pid):
                    body = request(peer.form, SHAPES[model])
                    load(url + peer.path, body, connections[0], 1)
                    for count in connections:
                        rate, p99 = load(url + peer.path, body, count, seconds)
                        raw.setdefault(count, rate)
                        measured[model, count, peer.name].append((rate, rate / raw[count], p99, resident(pid)))
    return measured


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default="tiny,resnet")
    parser.add_argument("--connections", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not (WRK and TASKSET):
        parser.error("wrk and taskset must be installed")
    connections = [int(count) for count in options.connections.split(",")]
    measured = measure(options.models.split(","), connections, options.seconds, options.rounds)
    print("| model | connections | server | requests/s | x raw | p99 ms | MB |\n|---|---|---|---|---|---|---|")
    for (model, count, name), rows in sorted(measured.items(), key=lambda item: item[0][:2]):
        rate, ratio, p99, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {model} | {count} | {name} | {rate:,.0f} | {ratio:.2f} | {p99:.1f} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
