"""Traces, as a collector receives them."""

from __future__ import annotations

import http.server
import os
from typing import Any

import httpx
import pytest
from serving import command, listening

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="traces need the extra otel"
)

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(http.server.ThreadingHTTPServer):
    """Receives spans over OTLP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Export)
        self.resources: list[Any] = []


class Export(http.server.BaseHTTPRequestHandler):
    """Keeps what one call brings."""

    def do_POST(self) -> None:
        """Take the call."""
        assert isinstance(self.server, Collector)
        request = trace_service.ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.resources += request.resource_spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


def test_a_request_is_a_span_of_its_callers_trace() -> None:
    """It has the method, the path and the status; health and metrics are no spans; none is lost at the end."""
    received = Collector()
    with listening(received):
        environment = os.environ | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{received.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "NO_PROXY": "127.0.0.1",
        }
        with command("serve", "demo", "--traces", env=environment) as url, httpx.Client(trust_env=False) as client:
            client.get(f"{url}/metrics").raise_for_status()
            parent = f"00-{TRACE}-b7ad6b7169203331-01"
            answer = client.post(
                f"{url}/v2/models/digits_cnn/infer", json={"inputs": []}, headers={"traceparent": parent}
            )
            assert answer.status_code == 400
            assert answer.headers["x-request-id"] == TRACE
            own = client.get(f"{url}/v2/models/digits_cnn").headers["x-request-id"]
    (resource,) = received.resources
    assert {"service.name": "guardserve"}.items() <= {
        attribute.key: attribute.value.string_value for attribute in resource.resource.attributes
    }.items()
    span, second = [span for scope in resource.scope_spans for span in scope.spans]
    assert span.trace_id.hex() == TRACE
    assert second.trace_id.hex() == own, "a request without a trace is called by that of its span"
    values = {attribute.key: attribute.value for attribute in span.attributes}
    assert values["http.method"].string_value == "POST"
    assert values["http.status_code"].int_value == 400
