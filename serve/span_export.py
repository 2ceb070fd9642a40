"""Where spans go: a collector that takes OTLP over HTTP."""

import os
from collections.abc import Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanContext, Status

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
_FASTAPI: Final = "fastapi"
_OWN_NAMES: Final = frozenset({"bt", _FASTAPI})
"""Tracers whose names of spans hold nothing of a request: stages, members, templates of routes."""
_KNOWN: Final = frozenset({"proxy_http_request", "route_to_replica", "replica_handle_request"})
"""First words of Ray Serve's names; of the proxy the path follows, as it was asked for."""


def span_processors() -> list[SpanProcessor]:
    """Return what takes the spans of a process; Serve asks for it in each of its processes."""
    os.environ.setdefault("OTEL_SERVICE_NAME", "bt")
    os.environ.setdefault("OTEL_RESOURCE_ATTRIBUTES", f"bt.run_id={run_id()}")
    return [BatchSpanProcessor(LeanExporter(), schedule_delay_millis=_DELAY_MILLISECONDS)]


class LeanExporter(OTLPSpanExporter):
    """Sends spans without texts of errors and paths: these may quote what was uploaded."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans to the collector."""
        return super().export([_lean(one) for one in spans])


def _lean(one: ReadableSpan) -> ReadableSpan:
    tracer = one.instrumentation_scope.name if one.instrumentation_scope else ""
    # FastAPI's is the template of a route, the proxy's the path itself.
    kept = _KEPT if tracer == _FASTAPI else _KEPT - {"http.route"}
    return ReadableSpan(
        name=one.name if tracer in _OWN_NAMES else _known_name(one.name),
        context=_without_state(one.context),
        parent=one.parent,
        resource=one.resource,
        attributes={k: v for k, v in (one.attributes or {}).items() if k in kept},
        kind=one.kind,
        status=Status(one.status.status_code),
        start_time=one.start_time,
        end_time=one.end_time,
        instrumentation_scope=one.instrumentation_scope,
    )


def _known_name(name: str) -> str:
    first = name.partition(" ")[0]
    return first if first in _KNOWN else "other"


def _without_state(context: SpanContext | None) -> SpanContext | None:
    """Return a span's ids without the caller's `tracestate`, which may hold any text."""
    if context is None:
        return None
    return SpanContext(context.trace_id, context.span_id, context.is_remote, context.trace_flags)
