"""A compiled model behind the server: compiled before it is ready, never again, and still monitored."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from pathlib import Path

import httpx
import pytest
import torch
from serving import command, loaded, metric, wait_until
from torch import nn

from guardserve.exceptions import SettingsError
from guardserve.runtime import Runtime

pytestmark = pytest.mark.usefixtures("fresh_compiler")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def net() -> nn.Module:
    """Return a small model with BatchNorm layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8)).eval()


@needs_compiler
def test_no_request_waits_for_the_compiler_and_the_monitor_sees_every_sample() -> None:
    """Whatever the batch size up to the most, the code is there once the model is ready, and answers as the model."""
    model = net()
    runtime = Runtime(loaded(copy.deepcopy(model)), compile_for=16)
    runtime.start()
    try:
        assert runtime.apart is None
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (5, 1, 16, 2, 7, 1, 3):
                x = torch.randn(rows, 3)
                (answer,) = runtime.infer({"x": x}).values()
                assert torch.allclose(answer, model(x), atol=1e-5)
            runtime.self_test()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert not torch._dynamo.utils.counters["graph_break"]
        snapshot = runtime.monitor.snapshot()
        assert snapshot.samples == 35
        assert [layer.name for layer in snapshot.layers] == ["0", "2"]
    finally:
        runtime.close()


FACTORY = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
"""


@needs_compiler
def test_the_command_serves_a_compiled_model_as_the_plain_one(tmp_path: Path) -> None:
    """It is ready when it is compiled; its answers and its samples are those of the model."""
    (tmp_path / "factory.py").write_text(FACTORY)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    x = torch.randn(3, 3)
    tensor = {"name": "input", "shape": [3, 3], "datatype": "FP32", "data": x.flatten().tolist()}
    options = ("factory:tiny", "--input-shape", "3", "--name", "net", "--compile", "--max-batch-size", "8")
    with (
        command("serve", *options, env=env, cwd=tmp_path) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        answer = client.post("/v2/models/net/infer", json={"inputs": [tensor]})
        data = torch.tensor(answer.json()["outputs"][0]["data"]).reshape(3, 8)
        assert torch.allclose(data, net()(x), atol=1e-4)
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == 3)
        assert metric(client, 'guardserve_batchnorm_layers{model="net",observed="true"}') == 2


def test_what_cannot_be_compiled_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a C++ compiler, and a TorchScript archive, are refused before anything listens."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SettingsError, match="no no-such-compiler: install it"):
        Runtime(loaded(net()), compile_for=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(net())
    with pytest.raises(SettingsError, match="TorchScript"):
        Runtime(loaded(script), compile_for=8)
