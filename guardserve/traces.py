"""OpenTelemetry traces, with the extra ``otel``: one span for each HTTP request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from guardserve.exceptions import MissingExtraError

QUIET = "/v2/health,/metrics,/ui"
"""Paths that are asked for all the time, and are not traced."""


PARENT = b"traceparent"


@contextmanager
def traced(app: ASGIApp) -> Iterator[ASGIApp]:
    """Trace an application's requests, and send what is left when the block ends.

    Where spans go and which are kept is OpenTelemetry's own environment variables' to say, such as
    ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME`` and ``OTEL_TRACES_SAMPLER``. A request that brings a
    ``traceparent`` continues its caller's trace; to the application each seems to come from its own span.

    Raises:
        MissingExtraError: If the extra ``otel`` is not installed.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("tracing", "otel") from error

    async def spanned(scope: Scope, receive: Receive, send: Send) -> None:
        span = trace.get_current_span().get_span_context()
        if scope["type"] == "http" and span.is_valid:
            parent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}".encode()
            others = [header for header in scope["headers"] if header[0] != PARENT]
            scope = {**scope, "headers": [*others, (PARENT, parent)]}
        await app(scope, receive, send)

    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "guardserve"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield OpenTelemetryMiddleware(
            spanned, excluded_urls=QUIET, tracer_provider=provider, exclude_spans=["receive", "send"]
        )
    finally:
        provider.shutdown()
