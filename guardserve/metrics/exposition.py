"""The formats in which metrics are shown."""

from __future__ import annotations

import re

from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_ASKED = re.compile(r"application/openmetrics-text *(?=;|$)(?!.*; *q=0(?:\.0*)?(?:;|$))(?!.*; *version=0\.)")


def negotiated(accept: str) -> str:
    """Return the content type of a scrape, given its ``Accept`` header: OpenMetrics if that is named, else text."""
    return OPENMETRICS if any(_ASKED.match(part.strip()) for part in accept.split(",")) else CONTENT_TYPE


def exposition(collector: Collector, content_type: str) -> bytes:
    """Return what a registry collects in Prometheus' text format, or with exemplars as :data:`OPENMETRICS`."""
    return (openmetrics.generate_latest if content_type == OPENMETRICS else generate_latest)(collector)
