"""Where spans go: a collector that takes OTLP over HTTP."""

import os
from collections.abc import Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Status

from bt_core.log import run_id

_DELAY_MILLISECONDS: Final = 1000
_KEPT: Final = frozenset(
    {
        "app",
        "deployment",
        "error.type",
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "replica_id",
    }
)
"""Attributes of spans that are sent on."""


def span_processors() -> list[SpanProcessor]:
    """Return what takes the spans of a process; Serve asks for it in each of its processes."""
    os.environ.setdefault("OTEL_SERVICE_NAME", "bt")
    os.environ.setdefault("OTEL_RESOURCE_ATTRIBUTES", f"bt.run_id={run_id()}")
    return [BatchSpanProcessor(LeanExporter(), schedule_delay_millis=_DELAY_MILLISECONDS)]


class LeanExporter(OTLPSpanExporter):
    """Sends spans without texts of errors and addresses: these may quote what was uploaded."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans to the collector."""
        return super().export([_lean(one) for one in spans])


def _lean(one: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=one.name,
        context=one.context,
        parent=one.parent,
        resource=one.resource,
        attributes={k: v for k, v in (one.attributes or {}).items() if k in _KEPT},
        kind=one.kind,
        status=Status(one.status.status_code),
        start_time=one.start_time,
        end_time=one.end_time,
        instrumentation_scope=one.instrumentation_scope,
    )
