"""What becomes of requests with samples unlike the reference, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from serving import command, loaded, metric, wait_until
from torch import nn

from guardserve import ReferenceProfile
from guardserve.cli import main
from guardserve.demo.digits import SHIFTS, Digits, load_digits
from guardserve.loading import load_model
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.limits import Limits
from guardserve.service.shift import ShiftPolicy

INFER = "/v2/models/net/infer"
USUAL, ODD = [0.1, 0.2, 0.3], [30.0, 30.0, 30.0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return a small model with BatchNorm layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> ReferenceProfile:
    """Fit a profile to normally distributed samples."""
    torch.manual_seed(0)
    return ReferenceProfile.fit(model, [torch.randn(1000, 3)], target_arl=1000)


def body(*rows: list[float], **parameters: object) -> dict[str, Any]:
    """Write a request."""
    data = [value for row in rows for value in row]
    tensor = {"name": "x", "shape": [len(rows), 3], "datatype": "FP32", "data": data}
    return {"inputs": [tensor]} | ({"parameters": parameters} if parameters else {})


@contextmanager
def served(model: nn.Module, profile: ReferenceProfile | None, policy: ShiftPolicy, **options: Any) -> Iterator[Any]:
    """Serve a model under a policy; give a client and the runtime."""
    runtime = Runtime(loaded(model), reference=profile, target_arl=1000, **options)
    app = create_app(runtime, shift_policy=policy, limits=Limits(max_queue_delay=0.05))
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: runtime.failure is None)
        yield client, runtime


def test_a_request_unlike_the_reference_is_refused_with_the_reason_and_still_counted(
    model: nn.Module, profile: ReferenceProfile
) -> None:
    """422 in the protocol's form, past ASGI and through it; the monitor has seen the sample all the same."""
    with served(model, profile, ShiftPolicy("reject")) as (client, runtime):
        answer = client.post(INFER, json=body(USUAL))
        assert answer.status_code == 200
        assert "parameters" not in answer.json()
        for request in (
            {"json": body(USUAL, ODD)},
            {"content": iter([client.build_request("POST", INFER, json=body(USUAL, ODD)).content])},
        ):
            answer = client.post(INFER, **request)
            assert answer.status_code == 422
            text = answer.json()["error"]
            assert text.startswith("1 of 2 samples are unlike the reference: p-value ")
            assert "not above the threshold 0.001" in text
        assert "the sample is unlike" in client.post(INFER, json=body(ODD)).json()["error"]
        assert runtime.monitor.verdict().samples == 6
        assert metric(client, 'guardserve_requests_total{model="net",status="422"}') == 3
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="unlike_reference"}') == 3
        assert metric(client, 'guardserve_shift_p_value_count{model="net"}') == 6
        assert metric(client, 'guardserve_shift_p_value_bucket{le="0.001",model="net"}') == 3


def test_requests_that_share_a_forward_are_judged_each_by_its_own_rows(
    model: nn.Module, profile: ReferenceProfile
) -> None:
    """A usual request beside an odd one is answered."""
    with served(model, profile, ShiftPolicy("reject")) as (client, _), ThreadPoolExecutor(8) as pool:
        rows = [ODD if index % 4 == 0 else USUAL for index in range(40)]
        statuses = list(pool.map(lambda row: client.post(INFER, json=body(row)).status_code, rows))
        assert statuses == [422 if row is ODD else 200 for row in rows]
        assert metric(client, 'guardserve_batch_size_bucket{le="1.0",model="net"}') < 40, "some shared a forward"


def test_a_flag_tells_the_p_values_and_whether_one_is_below_the_threshold(
    model: nn.Module, profile: ReferenceProfile
) -> None:
    """The answer is as ever; its parameters tell more."""
    with served(model, profile, ShiftPolicy("flag", 0.01)) as (client, _):
        for rows, flag in (((USUAL,), False), ((USUAL, ODD), True)):
            answer = client.post(INFER, json=body(*rows)).json()
            assert answer["parameters"]["guardserve_shift"] is flag
            assert len(answer["parameters"]["guardserve_p_values"].split()) == len(rows)
            assert answer["outputs"][0]["shape"] == [len(rows), 8]


def test_who_only_observes_refuses_and_tells_nothing(model: nn.Module, profile: ReferenceProfile) -> None:
    """Unless asked for p-values; the flag is the policy's alone."""
    with served(model, profile, ShiftPolicy()) as (client, _):
        assert "parameters" not in client.post(INFER, json=body(ODD)).json()
        asked = client.post(INFER, json=body(ODD, guardserve_p_values=True)).json()
        assert list(asked["parameters"]) == ["guardserve_p_values"]


@pytest.mark.parametrize("action", ["flag", "reject"])
def test_what_cannot_be_judged_is_not_held_against_it(action: Any) -> None:
    """NaN stands for a sample that cannot be judged, None for a monitor that cannot tell."""
    policy = ShiftPolicy(action, 0.01)
    assert policy.refusal(None) is None
    assert policy.refusal([float("nan"), 0.5]) is None
    assert policy.parameters(None, asked=True) == {}
    assert policy.parameters([float("nan")], asked=False).get("guardserve_shift", False) is False


def test_a_reference_is_made_of_the_first_requests_while_they_are_served(tmp_path: Path) -> None:
    """The state is warming until it is there, on disk too; from then on odd requests are refused, and it persists."""
    digits = load_digits()
    clean = torch.cat([digits.reference.images, digits.live.images])
    path = tmp_path / "profile.safetensors"
    runtime = Runtime(load_model("demo"), target_arl=1000, learn=200, learned=path, state=tmp_path / "state")
    infer = "/v2/models/digits_cnn/infer"

    def ask(images: torch.Tensor) -> int:
        tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.flatten().tolist()}
        return client.post(infer, json={"inputs": [tensor]}).status_code

    app = create_app(runtime, shift_policy=ShiftPolicy("reject", 0.01))
    with serve_in_background(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: runtime.failure is None)
        assert ask(SHIFTS["inverted"](clean[:1])) == 200
        for batch in torch.split(clean[:260], 10):
            assert ask(batch) == 200
        assert metric(client, 'guardserve_shift_state{model="digits_cnn",state="warming"}') == 1
        wait_until(path.exists)
        for _ in range(3):
            assert ask(SHIFTS["inverted"](clean[:4])) == 422
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="digits_cnn"}') == 273)
        assert metric(client, 'guardserve_reference_info{model="digits_cnn",samples="200",target_arl="1000"}') == 1
        assert runtime.monitor.verdict().state == "shifted"
    again = Runtime(
        load_model("demo"), reference=ReferenceProfile.load(path), target_arl=1000, state=tmp_path / "state"
    )
    try:
        again.start()
        assert again.monitor.verdict().state == "shifted"
    finally:
        again.close()


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Load the real digits once."""
    return load_digits()


def test_the_command_keeps_its_state_over_a_restart_and_refuses_a_damaged_one(digits: Digits, tmp_path: Path) -> None:
    """The alarm is still there after SIGTERM and a new start; a broken file is one line that says what to do."""
    profile = ReferenceProfile.fit(load_model("demo").module, torch.split(digits.reference.images, 50), target_arl=1000)
    profile.save(tmp_path / "profile")
    options = ["serve", "demo", "--reference", str(tmp_path / "profile"), "--state", str(tmp_path / "state")]
    options += ["--target-arl", "1000", "--shift-policy", "flag", "--monitor-budget", "0.1", "--drain-delay", "0"]
    refused = CliRunner().invoke(main, options)
    assert refused.exit_code == 1
    assert "451 reference samples give p-values from 0.0022 on" in refused.output
    options += ["--shift-p-threshold", "0.005"]
    odd = SHIFTS["inverted"](digits.live.images[:8])
    tensor = {"name": "image", "shape": [8, 1, 8, 8], "datatype": "FP32", "data": odd.flatten().tolist()}
    alarms = 'guardserve_shift_state{model="digits_cnn",state="shifted"}'
    with command(*options) as url, httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.post("/v2/models/digits_cnn/infer", json={"inputs": [tensor]}).json()
        assert answer["parameters"]["guardserve_shift"] is True
        wait_until(lambda: metric(client, alarms) == 1)
    assert np.fromfile(tmp_path / "state", np.uint8).size > 100
    with command(*options) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: metric(client, alarms) == 1)
    (tmp_path / "state").write_bytes(b"nothing of the kind")
    refused = CliRunner().invoke(main, options)
    assert refused.exit_code == 1
    assert "remove it to begin anew" in refused.output
