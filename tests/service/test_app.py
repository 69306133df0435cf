"""The service from outside: a real uvicorn on loopback, faulty models and faulty requests."""

from __future__ import annotations

import gzip
import json
import math
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from serving import loaded, metric, serving, wait_until
from torch import nn

from guardserve import ReferenceProfile, __version__
from guardserve.fingerprints import fingerprint
from guardserve.metrics import REASONS
from guardserve.runtime import Runtime
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.signature import TensorSpec

INFER = "/v2/models/net/infer"


def net() -> nn.Sequential:
    """Return a small model, left in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


def body(*rows: list[float], **changes: Any) -> dict[str, Any]:
    """Return a request for rows of three features, with some fields of its input changed."""
    tensor = {"name": "x", "shape": [len(rows), 3], "datatype": "FP32", "data": [v for row in rows for v in row]}
    return {"inputs": [tensor | changes]}


GOOD = body([1.0, 2.0, 3.0])


def error(answer: httpx.Response, status: int) -> str:
    """Check that an answer is a failure in the protocol's form, and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert isinstance(message, str)
    assert message
    return message


def test_a_request_gets_the_eval_answer_with_its_id() -> None:
    """The model left in training mode answers as in eval mode, row by row."""
    model = net()
    with torch.no_grad():
        rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        want = nn.Sequential(*model).eval()(rows)
    model.train()
    with serving(model) as client:
        answer = client.post(INFER, json=body(*rows.tolist()) | {"id": "mine"})
    assert answer.status_code == 200
    assert answer.json()["id"] == "mine"
    assert answer.json()["model_name"] == "net"
    (output,) = answer.json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output", "FP32", [2, 2])
    torch.testing.assert_close(torch.tensor(output["data"]).reshape(2, 2), want)
    assert all(module.training for module in model.modules()), "the model is as it was once the server has stopped"


def test_metadata_health_and_version_are_the_protocols() -> None:
    """Names, shapes with -1 for the batch, types and readiness, with and without a version."""
    with serving(net()) as client:
        assert client.get("/v2").json() == {
            "name": "guardserve",
            "version": __version__,
            "extensions": ["binary_tensor_data"],
        }
        tensor = {"datatype": "FP32", "shape": [-1, 3]}
        for path in ("/v2/models/net", "/v2/models/net/versions/1"):
            assert client.get(path).json() == {
                "name": "net",
                "versions": ["1", f"1-{fingerprint(net())}"],
                "platform": "pytorch_eager",
                "inputs": [{"name": "x", **tensor}],
                "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
            }
            assert client.get(f"{path}/ready").status_code == 200
            assert client.post(f"{path}/infer", json=GOOD).status_code == 200
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
            assert client.head(path).status_code == 200


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"content": b"{not json"}, "JSON"),
        ({"content": b""}, "JSON"),
        ({"json": [1]}, "object"),
        ({"json": body([1.0, 2.0, 3.0], shape=[1, 4])}, "4"),
        ({"json": body([1.0, 2.0, 3.0], shape=[3])}, r"\[3\]"),
        ({"json": body([1.0, 2.0, 3.0], datatype="INT64")}, "INT64"),
        ({"json": body([1.0, 2.0, 3.0], name="y")}, "'y'"),
        ({"json": body(*[[1.0, 2.0, 3.0]] * 9)}, "8"),
        ({"json": {"inputs": []}}, "x"),
        ({"content": b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,NaN,3]}]}'}, "non-finite"),
        ({"json": GOOD, "headers": {"Inference-Header-Content-Length": "-1"}}, "-1"),
    ],
)
def test_a_bad_request_is_named_and_the_server_lives_on(sent: dict[str, Any], says: str) -> None:
    """Each fault is a 400 in the protocol's form that names it, and the next request is answered."""
    with serving(net()) as client:
        message = error(client.post(INFER, **sent), 400)
        assert says.replace("\\", "") in message
        assert client.post(INFER, json=GOOD).status_code == 200
        assert metric(client, 'guardserve_requests_total{model="net",status="400"}') == 1
        errors = {r: metric(client, f'guardserve_request_errors_total{{model="net",reason="{r}"}}') for r in REASONS}
        assert sum(errors.values()) == 1


def test_unknown_paths_methods_models_and_versions_are_errors_in_the_protocols_form() -> None:
    """404 and 405 have the protocol's body, and there are no redirects."""
    with serving(net()) as client:
        error(client.get("/nothing"), 404)
        error(client.get("/v2/"), 404)
        error(client.get(INFER), 405)
        assert "'other'" in error(client.post("/v2/models/other/infer", json=GOOD), 404)
        assert "'7'" in error(client.get("/v2/models/net/versions/7"), 404)


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/net", "/v2/models/net/ready", "/metrics", "/ui"]
)
def test_head_is_answered_as_get_is_but_without_a_body(path: str) -> None:
    """As probes ask; by the same connection the next answer comes whole. What is only posted is not allowed."""
    with serving(net()) as client:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        own = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
        assert {n: v for n, v in head.headers.items() if n not in own} == {
            n: v for n, v in get.headers.items() if n not in own
        }
        assert int(head.headers["content-length"]) > 0 or "health" in path or path.endswith("/ready")
        assert client.head("/ui/events", timeout=5).status_code == 200
        assert (client.head("/none").status_code, client.head(INFER).status_code) == (404, 405)
        assert client.head(INFER).headers["allow"] == "POST"
        assert client.post(path).headers["allow"] == "GET, HEAD"


def test_a_body_that_is_too_large_is_refused_by_its_length_and_as_it_arrives() -> None:
    """Neither a declared length nor a stream gets past the limit."""
    with serving(net(), max_body_size=1000) as client:
        assert "1000" in error(client.post(INFER, content=b"x" * 1001), 413)
        error(client.post(INFER, content=iter([b"x" * 600, b"x" * 600])), 413)
        assert client.post(INFER, json=GOOD).status_code == 200


class Faulty(nn.Module):
    """Raises, or gives NaN for one row, when its input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return NaN in rows whose first feature is -7, raise where it is 7."""
        if (x[:, 0] == 7).any():
            raise FileNotFoundError("/secret/path")
        y: torch.Tensor = self.bn(x)
        return y.masked_fill(x[:, :1] == -7, float("nan"))


def test_a_model_that_raises_or_gives_nan_is_a_clear_error_and_the_server_lives_on() -> None:
    """The client learns which output and where it arose, but no path; everything is counted."""
    with serving(Faulty()) as client:
        message = error(client.post(INFER, json=body([7.0, 0.0, 0.0])), 500)
        assert "FileNotFoundError" in message
        assert "secret" not in message
        message = error(client.post(INFER, json=body([1.0, 0.0, 0.0], [-7.0, 1.0, 2.0])), 500)
        assert "output holds 3 non-finite values of 6, the first at index (1, 0)" in message
        assert "the model itself (Faulty)" in message
        assert client.post(INFER, json=GOOD).status_code == 200
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="model_error"}') == 1
        assert metric(client, 'guardserve_request_errors_total{model="net",reason="nonfinite_output"}') == 1
        assert metric(client, 'guardserve_nonfinite_samples_total{model="net",name="output",origin="output"}') == 1
        assert metric(client, 'guardserve_requests_in_flight{model="net"}') == 0


class OnlyPairs(nn.Module):
    """Fails at batch size 1, where its own normalisation by the batch has nothing to divide by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the batch's own statistics."""
        return nn.functional.batch_norm(x, None, None, training=True)


def test_a_model_that_fails_at_batch_one_never_becomes_ready() -> None:
    """The start-up probe's failure is what readiness and requests answer, and liveness stays up."""
    with serving(OnlyPairs()) as client:
        message = error(client.get("/v2/health/ready"), 503)
        assert "start-up probe failed" in message
        assert "more than 1 value per channel" in message
        error(client.post(INFER, json=GOOD), 503)
        assert client.get("/v2/health/live").status_code == 200
        assert metric(client, 'guardserve_model_ready{model="net"}') == 0


class Odd(nn.Module):
    """Returns whatever a function makes of its input."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: {}, "no output"),  # noqa: ARG005 - it takes an input all the same
        (lambda x: {1: x, "1": x}, "same name"),
        (lambda x: [x, [x]], "output_1 of the model's result is a list"),
        (lambda x: x.sum(), "()"),
        (lambda x: x[:1], "(1, 3) for a batch of 2"),
    ],
    ids=["complex", "sparse", "nothing", "same-name", "nested", "scalar", "one-row"],
)
def test_a_model_whose_outputs_cannot_be_served_never_becomes_ready(
    function: Callable[[torch.Tensor], Any], says: str
) -> None:
    """The probe looks at what the model returns, and readiness says what is wrong with it."""
    with serving(Odd(function)) as client:
        assert says in error(client.get("/v2/health/ready"), 503)
        assert client.get("/v2/models/net").status_code == 200


def test_an_output_without_a_row_for_each_sample_is_an_error() -> None:
    """What the probe could not see is checked in every answer."""
    with serving(Odd(lambda x: x[:2])) as client:
        assert client.post(INFER, json=GOOD).status_code == 200
        message = error(client.post(INFER, json=body(*[[1.0, 2.0, 3.0]] * 3)), 500)
        assert "(2, 3) for a batch of 3" in message


def test_a_model_that_tries_to_end_the_process_is_an_error_like_any_other() -> None:
    """SystemExit ends neither the server nor the protocol."""

    def leave(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] == 7:
            sys.exit(1)
        return x

    with serving(Odd(leave)) as client:
        assert "SystemExit" in error(client.post(INFER, json=body([7.0, 0.0, 0.0])), 500)
        assert client.post(INFER, json=GOOD).status_code == 200


def test_free_sizes_are_probed_large_enough_and_show_in_the_outputs() -> None:
    """A convolution over images of any size is probed with one that it can take."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with serving(model, TensorSpec("x", torch.float32, (-1, 3, -1, -1))) as client:
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/v2/models/net").json()["outputs"][0]["shape"] == [-1, 4, -1, -1]


def test_a_refused_input_is_no_forward() -> None:
    """Only what reached the model counts as a forward."""
    with serving(net()) as client:
        nan = b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,NaN,3]}]}'
        error(client.post(INFER, content=nan), 400)
        assert metric(client, 'guardserve_forward_duration_seconds_count{model="net"}') == 0
        assert metric(client, 'guardserve_nonfinite_samples_total{model="net",name="x",origin="input"}') == 1
        client.post(INFER, json=GOOD)
        assert metric(client, 'guardserve_forward_duration_seconds_count{model="net"}') == 1


def test_a_body_of_nothing_but_nan_costs_no_more_than_another() -> None:
    """A small compressed request of bad values must not grow into much memory when it is described."""
    spec = TensorSpec("x", torch.float32, (-1, 1_000_000))
    rows = torch.full((8, 1_000_000), float("nan")).numpy().tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [8, 1_000_000],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(rows)},
                }
            ]
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Encoding": "gzip"}
    with serving(Odd(lambda x: x[:, :3]), spec, max_body_size=2**26) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = error(client.post(INFER, content=gzip.compress(head + rows, 1), headers=headers, timeout=60), 400)
        assert "8000000 non-finite values of 8000000" in message
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 < 9 * len(rows)


class TwoInTwoOut(nn.Module):
    """Two inputs of different types and a dict of two outputs."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the sum and the flag."""
        return {"sum": x.sum(1) + ids, "flag": ids > 2}


def test_several_inputs_and_named_outputs_keep_their_names_types_and_order() -> None:
    """A dict's keys are the outputs' names; the filter chooses among them."""
    specs = (TensorSpec("x", torch.float32, (-1, 2)), TensorSpec("ids", torch.int64, (-1,)))
    inputs = [
        {"name": "ids", "shape": [2], "datatype": "INT64", "data": [1, 5]},
        {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, 4]]},
    ]
    with serving(TwoInTwoOut(), *specs) as client:
        both = client.post(INFER, json={"inputs": inputs}).json()["outputs"]
        assert {o["name"]: o["data"] for o in both} == {"sum": [4.0, 12.0], "flag": [False, True]}
        only = client.post(INFER, json={"inputs": inputs, "outputs": [{"name": "flag"}]}).json()["outputs"]
        assert [o["name"] for o in only] == ["flag"]
        assert "'none'" in error(client.post(INFER, json={"inputs": inputs, "outputs": [{"name": "none"}]}), 400)


def test_openapi_describes_every_endpoint_and_the_docs_page_is_there() -> None:
    """The document names both body forms of an inference request."""
    with serving(net()) as client:
        document = client.get("/openapi.json").json()
        content = document["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "application/octet-stream"}
        assert "/metrics" in document["paths"]
        references = re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(document))
        for reference in references:
            place = document
            for key in reference.split("/"):
                place = place[key]
        assert client.get("/docs").status_code == 200


def test_the_monitor_counts_what_was_served_and_not_the_probe() -> None:
    """Samples are the rows of answered requests."""
    with serving(net()) as client:
        assert metric(client, 'guardserve_samples_total{model="net"}') == 0
        for rows in (1, 3):
            client.post(INFER, json=body(*[[1.0, 2.0, 3.0]] * rows))
        wait_until(lambda: metric(client, 'guardserve_samples_total{model="net"}') == 4)
        assert math.isnan(metric(client, 'guardserve_shift_score{model="net"}')), "too few samples for a score"
        for _ in range(8):
            client.post(INFER, json=body(*[[1.0, 2.0, 3.0]] * 8))
        wait_until(lambda: metric(client, 'guardserve_shift_score{model="net"}') > 0)
        assert metric(client, 'guardserve_guard_violations_total{kind="training_on_entry",model="net"}') == 1


def nonfinite_request(**parameters: object) -> dict[str, Any]:
    """Return a request whose second row the faulty model answers with NaN, with parameters of its own."""
    return body([1.0, 0.0, 0.0], [-7.0, 1.0, 2.0]) | {"parameters": parameters}


def test_a_request_may_ask_for_nonfinite_outputs_and_is_told_of_them() -> None:
    """In binary to the bit, in JSON as strings when it says so, with what and where in the parameters."""
    flag = {"guardserve_on_nonfinite": "flag"}
    with serving(Faulty()) as client:
        answer = client.post(INFER, json=nonfinite_request(**flag, guardserve_nonfinite_strings=True)).json()
        told = answer["parameters"]["guardserve_nonfinite"]
        assert "output holds 3 non-finite values of 6, the first at index (1, 0)" in told
        assert answer["outputs"][0]["data"][3:] == ["NaN"] * 3
        assert all(isinstance(value, float) for value in answer["outputs"][0]["data"][:3])
        binary = client.post(INFER, json=nonfinite_request(**flag, binary_data_output=True))
        size = int(binary.headers["inference-header-content-length"])
        values = torch.frombuffer(bytearray(binary.content[size:]), dtype=torch.float32)
        assert values.isnan().tolist() == [False] * 3 + [True] * 3
        assert "guardserve_nonfinite" in json.loads(binary.content[:size])["parameters"]
        clean = client.post(INFER, json=GOOD | {"parameters": flag}).json()
        assert "parameters" not in clean
        assert metric(client, 'guardserve_nonfinite_samples_total{model="net",name="output",origin="output"}') == 2


def test_nonfinite_outputs_never_become_a_silent_null() -> None:
    """JSON without the wish for strings stays an error, which names the way out; a policy that is none is refused."""
    with serving(Faulty()) as client:
        message = error(client.post(INFER, json=nonfinite_request(guardserve_on_nonfinite="flag")), 500)
        assert "guardserve_nonfinite_strings" in message
        message = error(client.post(INFER, json=nonfinite_request(guardserve_on_nonfinite="ignore")), 400)
        assert "'ignore', not error or flag" in message
        error(client.post(INFER, json=nonfinite_request(guardserve_on_nonfinite="error")), 500)
        message = error(client.post(INFER, json=nonfinite_request(guardserve_nonfinite_strings=1)), 400)
        assert "guardserve_nonfinite_strings of the request's parameters must be a JSON boolean" in message


def test_infinity_is_written_with_its_sign() -> None:
    """As a client that reads the strings back needs it."""
    parameters = {"guardserve_on_nonfinite": "flag", "guardserve_nonfinite_strings": True}
    with serving(Odd(lambda x: x / (x.abs() != 9))) as client:
        answer = client.post(INFER, json=body([9.0, -9.0, 0.0]) | {"parameters": parameters})
        assert answer.json()["outputs"][0]["data"] == ["Infinity", "-Infinity", 0.0]


def test_p_values_are_sent_to_whom_asks_for_them() -> None:
    """One for each row, in the parameters; a server without a reference profile says what is missing."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.BatchNorm1d(8))
    torch.manual_seed(0)
    profile = ReferenceProfile.fit(model, [torch.randn(500, 3)], target_arl=1000)
    runtime = Runtime(loaded(model), reference=profile, target_arl=1000)
    asking = body([0.1, 0.2, 0.3], [30.0, 30.0, 30.0]) | {"parameters": {"guardserve_p_values": True}}
    with (
        serve_in_background(create_app(runtime)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        wait_until(lambda: runtime.failure is None)
        usual, odd = map(float, client.post(INFER, json=asking).json()["parameters"]["guardserve_p_values"].split())
        assert 0 < odd < usual <= 1
        assert "parameters" not in client.post(INFER, json=GOOD).json()
    with serving(net()) as client:
        assert "reference profile" in error(client.post(INFER, json=asking), 400)
