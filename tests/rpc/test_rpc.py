"""The protocol over gRPC, asked by tritonclient and by plain messages, beside HTTP with the same model."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from served_models import Echo, Two
from serving import TIMEOUT, command, free_port, loaded, metric, wait_until
from torch import nn
from tritonclient.grpc import service_pb2

from guardserve.exceptions import GuardserveError, MissingExtraError
from guardserve.metrics import REASONS
from guardserve.rpc import RpcServer, server
from guardserve.rpc.messages import CLASSES, MESSAGES, METHODS, SERVICE
from guardserve.runtime import Runtime
from guardserve.service.access import Access
from guardserve.service.app import create_app
from guardserve.service.background import serve_in_background
from guardserve.service.limits import Limits
from guardserve.signature import DATATYPES, TensorSpec

KEY = "a-key-of-a-client-1"
ROWS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)


@dataclass
class Faces:
    """A served model: its HTTP client, and where it listens for gRPC."""

    http: httpx.Client
    address: str

    def call(
        self, method: str, metadata: Mapping[str, str] | None = None, timeout: float = TIMEOUT, **fields: Any
    ) -> Any:
        """Make one call with a plain message."""
        with grpc.insecure_channel(self.address) as channel:
            stub = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=CLASSES[f"{method}Request"].SerializeToString,
                response_deserializer=CLASSES[f"{method}Response"].FromString,
            )
            return stub(
                CLASSES[f"{method}Request"](**fields), timeout=timeout, metadata=tuple((metadata or {}).items())
            )

    def refused(self, method: str, **options: Any) -> tuple[grpc.StatusCode, str]:
        """Make one call that fails; return its status and the server's words."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, **options)
        failed: Any = caught.value
        return failed.code(), failed.details()


@contextmanager
def faces(
    module: nn.Module, *inputs: TensorSpec, access: Access | None = None, linger: float = 0.01, **limits: Any
) -> Iterator[Faces]:
    """Serve a module over both; give it once its start-up probe has ended.

    Args:
        module: The model.
        inputs: Its inputs.
        access: Who may call.
        linger: Seconds for which calls are refused in words when the server stops: they hold up each test.
        limits: What is accepted.
    """
    runtime = Runtime(loaded(module, *inputs))
    app = create_app(runtime, access=access, limits=Limits(**{"max_body_size": 2**20, **limits}))
    rpc = RpcServer(app, app.gateway, "127.0.0.1", 0, max_message_size=2**20, grace=5)
    with (
        mock.patch.object(server, "LINGER", linger),
        serve_in_background(app, companion=rpc) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client,
    ):
        wait_until(lambda: runtime.failure is None or "failed" in runtime.failure)
        yield Faces(client, f"127.0.0.1:{rpc.port}")


def triton_input(array: np.ndarray[Any, Any], datatype: str = "FP32", name: str = "x") -> triton.InferInput:
    """Return an input of tritonclient's."""
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def typed(**changes: Any) -> dict[str, Any]:
    """Return the fields of a request with typed contents, its input changed."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3], "contents": {"fp32_contents": ROWS.reshape(-1)}}
    return {"model_name": "net", "inputs": [{**tensor, **changes}]}


def raw(data: bytes = ROWS.tobytes(), **changes: Any) -> dict[str, Any]:
    """Return the fields of a request with raw contents, its input changed."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3]}
    return {"model_name": "net", "inputs": [{**tensor, **changes}], "raw_input_contents": [data]}


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_every_field_has_the_name_the_number_and_the_type_that_others_give_it(name: str) -> None:
    """Compared with tritonclient's definition, which has more fields and messages."""
    ours = CLASSES[name].DESCRIPTOR
    theirs: Any = service_pb2
    for part in name.split("."):
        theirs = getattr(theirs, part)
    known = {field.name: field for field in theirs.DESCRIPTOR.fields}
    for field in ours.fields:
        other = known[field.name]
        assert (field.number, field.type) == (other.number, other.type), field.name
        assert field.is_repeated == other.is_repeated
        if field.message_type is not None:
            assert field.message_type.full_name == other.message_type.full_name
        assert (field.containing_oneof is None) == (other.containing_oneof is None)


def test_tritonclient_finds_the_server_and_the_model() -> None:
    """Health, readiness and metadata say what HTTP says."""
    with faces(Two()) as served, triton.InferenceServerClient(served.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net")
        assert client.is_model_ready("net", "1")
        assert client.get_server_metadata().name == "guardserve"
        metadata, http = client.get_model_metadata("net", as_json=True), served.http.get("/v2/models/net").json()
        for tensors in (metadata["inputs"], metadata["outputs"]):
            for tensor in tensors:
                tensor["shape"] = [int(size) for size in tensor["shape"]]
        assert metadata == http


def test_tritonclient_gets_the_answers_of_http() -> None:
    """With identifier, filter and version; sync and async."""
    with faces(Two()) as served:
        body = {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ROWS.tolist()}]}
        outputs = served.http.post("/v2/models/net/infer", json=body).json()["outputs"]
        want = {entry["name"]: np.array(entry["data"], np.float32).reshape(entry["shape"]) for entry in outputs}
        wanted = [triton.InferRequestedOutput("inverse")]
        with triton.InferenceServerClient(served.address) as client:
            everything = client.infer("net", [triton_input(ROWS)], request_id="one")
            chosen = client.infer("net", [triton_input(ROWS)], model_version="1", outputs=wanted)

        async def ask() -> Any:
            async with triton_aio.InferenceServerClient(served.address) as client:
                return await client.infer("net", [triton_input(ROWS)])

        for result in (everything, asyncio.run(ask())):
            for name, array in want.items():
                np.testing.assert_array_equal(result.as_numpy(name), array)
        assert everything.get_response().id == "one"
        assert everything.get_response().model_version.startswith("1-")
        np.testing.assert_array_equal(chosen.as_numpy("inverse"), want["inverse"])
        assert chosen.as_numpy("normal") is None
        assert metric(served.http, 'guardserve_requests_total{model="net",status="200"}') == 4


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_is_served_raw_and_typed(datatype: str) -> None:
    """Answers come in the form of their requests; FP16 and BF16 have no typed one."""
    tensor = torch.tensor([[0, 1, 1]]).to(DATATYPES[datatype])
    data = bytes(tensor.view(torch.uint8).numpy()) if datatype != "BOOL" else bytes(tensor.numpy())
    entry: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [1, 3]}
    with faces(Echo(), TensorSpec("x", tensor.dtype, (-1, 3))) as served:
        answer = served.call("ModelInfer", model_name="net", inputs=[entry], raw_input_contents=[data])
        assert list(answer.raw_output_contents) == [data]
        assert not answer.outputs[0].HasField("contents")
        fields = {"INT64": "int64", "UINT64": "uint64", "BOOL": "bool", "FP32": "fp32", "FP64": "fp64"}
        field = fields.get(datatype, "uint" if datatype.startswith("U") else "int") + "_contents"
        entry["contents"] = {field: [0, 1, 1]}
        if datatype in {"FP16", "BF16"}:
            code, text = served.refused("ModelInfer", model_name="net", inputs=[entry])
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "raw_input_contents" in text
            return
        answer = served.call("ModelInfer", model_name="net", inputs=[entry])
        assert list(getattr(answer.outputs[0].contents, field)) == [0, 1, 1]
        assert not answer.raw_output_contents
        assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == (datatype, [1, 3])


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        (typed(name="y"), "INVALID_ARGUMENT", "unknown input 'y'"),
        (typed(shape=[2, 2]), "INVALID_ARGUMENT", "contents holds 6 values, but shape [2, 2] takes 4"),
        (typed(shape=[-2, -3]), "INVALID_ARGUMENT", "not a list of non-negative integers"),
        (typed(shape=[3, 2]), "INVALID_ARGUMENT", "but the model takes [-1, 3]"),
        (typed(datatype="FP64", contents={"fp64_contents": [0.0] * 6}), "INVALID_ARGUMENT", "takes FP32"),
        (typed(datatype="FP64"), "INVALID_ARGUMENT", "belongs in fp64_contents"),
        (typed(datatype="BYTES", contents={"bytes_contents": [b"a"] * 6}), "INVALID_ARGUMENT", "not strings"),
        (typed(datatype="FP128"), "INVALID_ARGUMENT", "FP128"),
        (typed(contents={"fp32_contents": [float("nan")] * 6}), "INVALID_ARGUMENT", "send finite numbers"),
        (typed(contents={"fp32_contents": [0.0] * 6}), "INTERNAL", "the model gave a non-finite output"),
        (raw(ROWS.tobytes()[:-1]), "INVALID_ARGUMENT", "binary_data_size is 23"),
        (raw(contents={"fp32_contents": [0.0]}), "INVALID_ARGUMENT", "but there are raw_input_contents"),
        ({**raw(), "raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "2 entries for 1 inputs"),
        ({**raw(), "outputs": [{"name": "z"}]}, "INVALID_ARGUMENT", "unknown output 'z'"),
        ({**raw(), "model_name": "other"}, "NOT_FOUND", "unknown model 'other'"),
        ({**raw(), "model_version": "7"}, "NOT_FOUND", "unknown version '7'"),
        ({**raw(), "parameters": {"guardserve_on_nonfinite": {"string_param": "no"}}}, "INVALID_ARGUMENT", "'no'"),
    ],
)
def test_what_http_refuses_is_refused_in_its_words_and_counted(fields: dict[str, Any], code: str, says: str) -> None:
    """With the status of gRPC that stands for HTTP's, one failure each in the metrics."""
    with faces(Two()) as served:
        found, text = served.refused("ModelInfer", **fields)
        assert (found, says in text) == (getattr(grpc.StatusCode, code), True), text
        failures = [
            metric(served.http, f'guardserve_request_errors_total{{model="net",reason="{reason}"}}')
            for reason in REASONS
        ]
        assert sum(failures) == 1
        assert served.call("ModelInfer", **raw()).outputs[0].name == "normal"


def test_integers_out_of_range_are_refused() -> None:
    """The typed contents of small integers are wider than these."""
    with faces(Echo(), TensorSpec("x", torch.int8, (-1, 3))) as served:
        entry = {"name": "x", "datatype": "INT8", "shape": [1, 3], "contents": {"int_contents": [1, 300, 2]}}
        code, text = served.refused("ModelInfer", model_name="net", inputs=[entry])
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "300 is not INT8, an integer from -128 to 127" in text


def test_parameters_go_and_come() -> None:
    """A request may take non-finite outputs, and is told of them."""
    with faces(Two()) as served:
        parameters = {"guardserve_on_nonfinite": {"string_param": "flag"}}
        answer = served.call("ModelInfer", **raw(bytes(24)), parameters=parameters)
        assert "inverse" in answer.parameters["guardserve_nonfinite"].string_param
        assert np.isinf(np.frombuffer(answer.raw_output_contents[1], np.float32)).all()


def test_an_api_key_is_asked_for_in_the_metadata() -> None:
    """As HTTP asks for it in a header; health is as open as there."""
    with faces(Two(), access=Access([KEY])) as served:
        for metadata in ({}, {"authorization": f"Bearer {KEY}x"}):
            for method, fields in (("ModelInfer", raw()), ("ModelReady", {"name": "net"}), ("ServerMetadata", {})):
                code, text = served.refused(method, metadata=metadata, **fields)
                assert code is grpc.StatusCode.UNAUTHENTICATED
                assert "API key" in text
            assert served.call("ServerReady", metadata=metadata).ready
        assert len(served.call("ModelInfer", metadata={"authorization": f"Bearer {KEY}"}, **raw()).outputs) == 2


class Gate(nn.Module):
    """Waits at a gate for inputs that begin with 77, and remembers the first features that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.open = threading.Event()
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, when the gate is open."""
        self.seen += x[:, 0].tolist()
        if (x[:, 0] == 77).any():
            self.open.wait(30)
        y: torch.Tensor = self.bn(x)
        return y


def row(first: float) -> dict[str, Any]:
    """Return the fields of a request of one row."""
    return raw(np.array([[first, 1, 2]], np.float32).tobytes(), shape=[1, 3])


@contextmanager
def blocked(**limits: Any) -> Iterator[tuple[Faces, Gate, Callable[[float], Any]]]:
    """Serve a model whose worker waits; give the faces, the model, and what makes a call in a thread."""
    gate = Gate()
    with faces(gate, max_batch_size=1, **limits) as served, ThreadPoolExecutor(8) as threads:

        def begin(first: float) -> Any:
            return threads.submit(served.call, "ModelInfer", **row(first))

        try:
            first = begin(77)
            wait_until(lambda: 77 in gate.seen)
            yield served, gate, begin
            gate.open.set()
            assert first.result().outputs
        finally:
            gate.open.set()


def waiting(served: Faces) -> float:
    """Read how many requests wait."""
    return metric(served.http, 'guardserve_queue_size{model="net"}')


def test_a_full_queue_is_unavailable_at_once() -> None:
    """With the seconds after which to come back."""
    with blocked(max_queue_size=1) as (served, gate, begin):
        accepted = begin(1)
        wait_until(lambda: waiting(served) == 1)
        with pytest.raises(grpc.RpcError) as caught:
            served.call("ModelInfer", metadata={"x-request-id": "mine"}, **row(2))
        failed: Any = caught.value
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert "requests are waiting" in failed.details()
        told = dict(failed.trailing_metadata())
        assert (told["retry-after"], told["x-request-id"]) == ("1", "mine")
        gate.open.set()
        assert accepted.result().outputs
    assert 2.0 not in gate.seen


def test_a_deadline_drops_the_work_that_waits() -> None:
    """The model never sees it, the client gets DEADLINE_EXCEEDED, and nothing stays in the queue."""
    with blocked() as (served, gate, _):
        started = time.monotonic()
        code, _ = served.refused("ModelInfer", **row(5), timeout=0.3)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.25 <= time.monotonic() - started < 2
        wait_until(lambda: waiting(served) == 0)
        wait_until(lambda: metric(served.http, 'guardserve_requests_in_flight{model="net"}') == 1)
    assert 5.0 not in gate.seen


def test_a_call_that_is_cancelled_takes_its_work_with_it() -> None:
    """It is counted as a client that has gone."""
    with blocked() as (served, gate, _), grpc.insecure_channel(served.address) as channel:
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        call = stub.future(CLASSES["ModelInferRequest"](**row(6)).SerializeToString())
        wait_until(lambda: waiting(served) == 1)
        call.cancel()
        wait_until(lambda: waiting(served) == 0)
        wait_until(lambda: metric(served.http, 'guardserve_requests_total{model="net",status="499"}') == 1)
        gate.open.set()
    assert 6.0 not in gate.seen


def test_calls_are_batched_with_each_other_and_answered_each_by_itself() -> None:
    """The rows of calls that wait together share forwards; each gets its own."""
    gate = Gate()
    with faces(gate) as served, ThreadPoolExecutor(9) as threads:
        first = threads.submit(served.call, "ModelInfer", **row(77))
        wait_until(lambda: 77 in gate.seen)
        calls = {n: threads.submit(served.call, "ModelInfer", **row(n)) for n in range(1, 9)}
        wait_until(lambda: waiting(served) == 8)
        before = metric(served.http, 'guardserve_batch_size_count{model="net"}')
        gate.open.set()
        assert first.result().outputs
        for n, call in calls.items():
            (data,) = call.result().raw_output_contents
            np.testing.assert_allclose(np.frombuffer(data, np.float32), np.array([n, 1, 2]) / np.sqrt(1 + 1e-5), 1e-6)
        assert metric(served.http, 'guardserve_batch_size_count{model="net"}') - before == 2


def test_a_message_that_is_too_large_is_refused() -> None:
    """By gRPC itself, before it is read."""
    with faces(Two()) as served:
        code, _ = served.refused("ModelInfer", **raw(bytes(2**21), shape=[2**21 // 12, 3]))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.call("ServerLive").live


def test_a_message_that_is_too_large_when_it_is_decompressed_is_refused() -> None:
    """A few bytes that would become many."""
    with faces(Two()) as served, grpc.insecure_channel(served.address) as channel:
        request = CLASSES["ModelInferRequest"](**raw(bytes(2**25), shape=[2**25 // 12, 3]))
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            stub(request.SerializeToString(), timeout=20, compression=grpc.Compression.Gzip)
        failed: Any = caught.value
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("form", ["raw", "typed"])
def test_a_large_message_is_translated_aside(form: str) -> None:
    """And gets the same answer as a small one, row by row."""
    rows = np.random.default_rng(0).normal(size=(40_000, 3)).astype(np.float32) + 10
    with faces(Two(), max_batch_size=40_000) as served:
        entry: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(rows.shape)}
        fields: dict[str, Any] = {"raw_input_contents": [rows.tobytes()]}
        if form == "typed":
            entry["contents"], fields = {"fp32_contents": rows.reshape(-1)}, {}
        answer = served.call("ModelInfer", model_name="net", inputs=[entry], **fields)
        if form == "raw":
            found = np.frombuffer(answer.raw_output_contents[1], np.float32)
        else:
            found = np.array(answer.outputs[1].contents.fp32_contents, np.float32)
        np.testing.assert_allclose(found, 1 / rows[:, 0], rtol=1e-6)


def test_a_model_that_is_not_ready_says_so() -> None:
    """Readiness is false rather than an error; inference is unavailable."""

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(x)

    with faces(Broken()) as served:
        assert served.call("ServerLive").live
        assert not served.call("ServerReady").ready
        assert not served.call("ModelReady", name="net").ready
        assert served.refused("ModelReady", name="other")[0] is grpc.StatusCode.NOT_FOUND
        assert served.refused("ModelInfer", **raw())[0] is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_stops_finishes_its_calls() -> None:
    """Those that it has accepted; no more are taken."""
    gate = Gate()
    with ThreadPoolExecutor(4) as threads:
        with faces(gate, max_batch_size=1, linger=server.LINGER) as served:
            calls = [threads.submit(served.call, "ModelInfer", **row(77))]
            wait_until(lambda: 77 in gate.seen)
            calls += [threads.submit(served.call, "ModelInfer", **row(n)) for n in (1, 2)]
            wait_until(lambda: waiting(served) == 2)
            threading.Timer(0.5, gate.open.set).start()
        assert all(call.result().outputs for call in calls)
    assert served.refused("ServerLive")[0] is grpc.StatusCode.UNAVAILABLE


def test_no_call_that_was_accepted_is_lost_when_the_server_stops() -> None:
    """Under load every row that the model has seen is an answer that its client got."""
    gate = Gate()
    gate.open.set()
    answered: list[float] = []

    def hammer(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            message = CLASSES["ModelInferRequest"](**row(77)).SerializeToString()
            while True:
                try:
                    stub(message, timeout=TIMEOUT)
                except grpc.RpcError as error:
                    failed: Any = error
                    assert failed.code() is grpc.StatusCode.UNAVAILABLE, failed
                    assert "the server is stopping" in failed.details()
                    return
                answered.append(77)

    with ThreadPoolExecutor(6) as threads:
        with faces(gate, linger=3.0) as served:  # however busy the clients are
            clients = [threads.submit(hammer, served.address) for _ in range(6)]
            wait_until(lambda: len(answered) > 100)
        for client in clients:
            client.result()
    assert gate.seen.count(77) == len(answered)


def test_every_method_is_there_and_no_other() -> None:
    """One that is not says so."""
    with faces(Two()) as served, grpc.insecure_channel(served.address) as channel:
        for method in METHODS:
            assert CLASSES[f"{method}Request"] is not None
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/ModelStreamInfer")(b"", timeout=10)
        failed: Any = caught.value
        assert failed.code() is grpc.StatusCode.UNIMPLEMENTED


def test_garbage_is_refused_and_harms_nobody() -> None:
    """Bytes that are no message."""
    with faces(Two()) as served:
        with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff" * 100, timeout=10)
        assert served.call("ServerReady").ready


def test_a_port_that_is_taken_is_an_error() -> None:
    """Before anything is served."""
    with faces(Two()) as served:
        port = int(served.address.rpartition(":")[2])
        second = RpcServer(create_app, create_app, "127.0.0.1", port, max_message_size=1)  # type: ignore[arg-type]
        with pytest.raises(GuardserveError, match="cannot listen"):
            asyncio.run(second.start())


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to install."""

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"guardserve\[grpc\]"):
        RpcServer(create_app, create_app, "127.0.0.1", 0, max_message_size=1)  # type: ignore[arg-type]


def test_a_call_is_a_span_of_its_callers_trace() -> None:
    """As a request over HTTP is, with the path that it stands for."""
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = exporting.InMemorySpanExporter()
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider()
    provider.add_span_processor(pytest.importorskip("opentelemetry.sdk.trace.export").SimpleSpanProcessor(exporter))
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.asgi")
    runtime = Runtime(loaded(Two()))
    app = create_app(runtime)
    traced = instrumentation.OpenTelemetryMiddleware(app, tracer_provider=provider, exclude_spans=["receive", "send"])
    rpc = RpcServer(traced, app.gateway, "127.0.0.1", 0, max_message_size=2**20)
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serve_in_background(app, companion=rpc) as url, httpx.Client(base_url=url, trust_env=False) as client:
        wait_until(lambda: runtime.failure is None)
        served = Faces(client, f"127.0.0.1:{rpc.port}")
        assert served.call("ModelInfer", metadata={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}, **raw()).outputs
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace
    assert "/v2/models/net/infer" in span.attributes.values()


def test_tls_is_served_with_the_certificate_of_https(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    """A client that does not trust it, or speaks without it, gets nothing."""
    certificate, key = tmp_path / "server.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    making = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    making += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([require_program("openssl"), *making, *subject], check=True, capture_output=True)
    runtime = Runtime(loaded(Two()))
    app = create_app(runtime)
    rpc = RpcServer(app, app.gateway, "127.0.0.1", 0, max_message_size=2**20, certificate=(certificate, key))
    with serve_in_background(app, companion=rpc):
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        for channel, status in (
            (grpc.secure_channel(f"127.0.0.1:{rpc.port}", trusted), None),
            (grpc.secure_channel(f"127.0.0.1:{rpc.port}", grpc.ssl_channel_credentials()), grpc.StatusCode.UNAVAILABLE),
            (grpc.insecure_channel(f"127.0.0.1:{rpc.port}"), grpc.StatusCode.UNAVAILABLE),
        ):
            with channel:
                call = channel.unary_unary(f"/{SERVICE}/ServerLive").future(b"", timeout=10)
                failed = call.exception()
                assert (None if failed is None else failed.code()) is status


def test_the_command_serves_both(tmp_path: Path) -> None:
    """With --grpc-port."""
    port = free_port()
    image = np.zeros((1, 1, 8, 8), np.float32)
    with (
        command("serve", "demo", "--grpc-port", str(port), "--log-level", "error", cwd=tmp_path),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        result = client.infer("digits_cnn", [triton_input(image, name="image")])
        (output,) = [tensor.name for tensor in result.get_response().outputs]
        assert result.as_numpy(output).shape == (1, 10)
