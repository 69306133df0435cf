"""OpenTelemetry traces, with the extra ``otel``: one span for each HTTP request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from guardserve.exceptions import MissingExtraError

QUIET = "/v2/health,/metrics,/ui"
"""Paths that are asked for all the time, and are not traced."""


@contextmanager
def traced(app: ASGIApp) -> Iterator[ASGIApp]:
    """Trace an application's requests, and send what is left when the block ends.

    Where spans go and which are kept is OpenTelemetry's own environment variables' to say, such as
    ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME`` and ``OTEL_TRACES_SAMPLER``. A request that brings a
    ``traceparent`` continues its caller's trace.

    Raises:
        MissingExtraError: If the extra ``otel`` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("tracing", "otel") from error
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "guardserve"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield OpenTelemetryMiddleware(
            app, excluded_urls=QUIET, tracer_provider=provider, exclude_spans=["receive", "send"]
        )
    finally:
        provider.shutdown()
