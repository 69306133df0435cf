"""Request ids from end to end: in answers, and in the log lines of requests that failed."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
from serving import loaded, metric, serving, wait_until
from torch import nn

from guardserve import ReferenceProfile
from guardserve.identity import MAX_LENGTH, Identity
from guardserve.logs import LINES, JsonFormatter
from guardserve.runtime import Runtime
from guardserve.service.answer import refusal
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.connection import PATIENCE
from guardserve.service.report import Reporter
from guardserve.service.shift import ShiftPolicy

INFER = "/v2/models/net/infer"
TRACE = "0af7651916cd43dd8448eb211c80319c"

BROKEN, INFINITE, SLOW = -100.0, -101.0, -102.0


class Moody(nn.Module):
    """Raises, gives infinity or takes long for inputs that begin so."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run it."""
        if (x[:, 0] == BROKEN).any():
            raise ValueError("a secret")
        if (x[:, 0] == SLOW).any():
            time.sleep(0.5)
        y: torch.Tensor = self.bn(x)
        return y / (x[:, :1] != INFINITE)


@contextmanager
def lines() -> Iterator[list[dict[str, Any]]]:
    """Collect what is logged as JSON."""
    stream, found = io.StringIO(), list[dict[str, Any]]()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("guardserve")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        found += [json.loads(line) for line in stream.getvalue().splitlines()]


def body(first: float, **more: object) -> dict[str, Any]:
    """Write a request of one row."""
    return {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [first, 1, 2]}], **more}


def late(client: httpx.Client, content: dict[str, Any]) -> Iterator[bytes]:
    """Send a body in pieces, the second so late that the request goes the long way."""
    whole = client.build_request("POST", INFER, json=content).content
    yield whole[:5]
    time.sleep(10 * PATIENCE)
    yield whole[5:]


def test_every_answer_has_the_id_of_its_request() -> None:
    """Of inference past ASGI and through it, of refusals, of what is not found, and of health."""
    with serving(Moody()) as client:
        for path, form, status in (
            (INFER, {"json": body(1)}, 200),
            (INFER, {"content": late(client, body(1))}, 200),
            (INFER, {"json": {"inputs": []}}, 400),
            (INFER, {"content": b"x" * 2**21}, 413),
            (INFER, {"json": body(BROKEN)}, 500),
            ("/v2/models/other/infer", {"json": body(1)}, 404),
            ("/none", {}, 404),
        ):
            headers = {"X-Request-Id": f"mine-{status}"}
            answer = client.post(path, headers=headers, **form)
            assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, [f"mine-{status}"])
        parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        assert client.get("/v2/health/ready", headers=parent).headers["x-request-id"] == TRACE
        made = {client.post(INFER, json=body(1)).headers["x-request-id"] for _ in range(5)}
        assert len(made) == 5
        evil = client.post(INFER, json=body(1), headers={"X-Request-Id": "two words"}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", evil)


@pytest.mark.parametrize("long", [False, True])
def test_every_line_about_a_request_that_failed_has_its_ids(long: bool) -> None:
    """The model's error, the origin of infinity, a deadline: on the way past ASGI, and through it."""
    with lines() as found, serving(Moody()) as client:
        for first, more, status in (
            (BROKEN, {}, 500),
            (INFINITE, {}, 500),
            (SLOW, {"parameters": {"timeout": 100_000}}, 504),
            (1.0, {}, 200),
        ):
            content = body(first, id=f"{first:.0f}" + "i" * 2 * MAX_LENGTH, **more)
            headers = {"X-Request-Id": f"mine-{first:.0f}", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
            form: dict[str, Any] = {"content": late(client, content)} if long else {"json": content}
            assert client.post(INFER, headers=headers, **form).status_code == status
    told = [line for line in found if "request_id" in line]
    assert {line["request_id"] for line in told} == {"mine--100", "mine--101", "mine--102"}
    assert all(line["trace_id"] == TRACE and line["protocol_id"][:4] in line["request_id"] for line in told)
    assert all(len(line["protocol_id"]) == MAX_LENGTH for line in told)
    ended = [
        (line["event"], line["model"], line["status"], line["reason"], line["request_id"])
        for line in told
        if line["logger"] == "guardserve.service.report"
    ]
    assert ended == [
        ("request", "net", 500, "model_error", "mine--100"),
        ("request", "net", 500, "nonfinite_output", "mine--101"),
        ("request", "net", 504, "timeout", "mine--102"),
    ]
    errors = {line["request_id"]: line for line in told if line["logger"] != "guardserve.service.report"}
    assert "ValueError: a secret" in errors["mine--100"]["exception"]
    assert "arose in" in errors["mine--101"]["message"]
    assert errors["mine--101"]["model"] == "net"
    assert not any("secret" in line["message"] for line in told)


def test_requests_in_one_forward_are_told_apart() -> None:
    """The line of a NaN names the request that it was in, not those beside it."""
    with lines() as found, serving(Moody(), max_queue_delay=0.2) as client, ThreadPoolExecutor(6) as pool:
        values = [1.0, INFINITE, 2.0, 3.0, INFINITE, 4.0]
        answers = list(
            pool.map(
                lambda item: client.post(INFER, json=body(item[1]), headers={"X-Request-Id": f"r{item[0]}"}),
                enumerate(values),
            )
        )
        assert [answer.status_code for answer in answers] == [500 if v == INFINITE else 200 for v in values]
        assert metric(client, 'guardserve_batch_size_bucket{le="1.0",model="net"}') < len(values), "some were together"
    assert {line["request_id"] for line in found if "request_id" in line} == {"r1", "r4"}
    assert {line["request_id"] for line in found if line["logger"] == "guardserve.runtime"} == {"r1", "r4"}


def test_a_request_that_the_shift_policy_refuses_is_told_with_its_id() -> None:
    """Its line says why."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
    profile = ReferenceProfile.fit(model, [torch.randn(1000, 3)], target_arl=1000)
    runtime = Runtime(loaded(model), reference=profile, target_arl=1000)
    app = create_app(runtime, shift_policy=ShiftPolicy("reject"))
    with (
        lines() as found,
        serve_in_background(app) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        wait_until(lambda: runtime.failure is None)
        assert client.post(INFER, json=body(50), headers={"X-Request-Id": "odd"}).status_code == 422
    (line,) = [line for line in found if line.get("request_id") == "odd"]
    assert (line["status"], line["reason"]) == (422, "unlike_reference")
    assert "unlike the reference: p-value" in line["message"]


def test_a_flood_of_failures_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """So many lines a second for each reason, and a count of what was left out; clients' own faults are none."""
    now = [100.2]
    reporter = Reporter("net", lambda: now[0])
    for _ in range(3 * LINES):
        reporter.report(refusal(503, "overloaded", "busy"), Identity({}))
        reporter.report(refusal(400, "malformed", "no JSON"), Identity({}))
    reporter.report(refusal(504, "timeout", "late"), None)
    assert [record.getMessage().endswith("busy") for record in caplog.records] == [True] * LINES + [False]
    now[0] += 1
    reporter.report(refusal(503, "overloaded", "busy"), Identity({}))
    assert caplog.messages[-1].endswith(f"overloaded: busy (and {2 * LINES} before it, which were not told)")
    assert getattr(caplog.records[-1], "left_out", None) == 2 * LINES
