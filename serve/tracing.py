"""Traces on request: stages of a request as spans for an OpenTelemetry collector.

::

    POST /v1/predictions                 by FastAPI; the caller's `traceparent` is its parent
      fastapi.endpoint
        decode, preprocess               in a process of its own
        ensemble
          route_to_replica               by Ray Serve, as its child; scans that are answered
            replica_handle_request       together have one, in the first one's trace
              member NAME

Spans say what took how long, and nothing of a scan. Without a collector they cost nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from opentelemetry import trace

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Variable of the environment that says where spans go, as OpenTelemetry has it."""
SERVE_CONFIG: Final = {
    "enabled": True,
    "exporter_import_path": "serve.span_export:span_processors",
    "sampling_ratio": 1.0,
}
"""What Serve is started with; that a caller's trace is not to be recorded is heeded."""
Lap = tuple[str, int, int]
"""Name, begin and end, in nanoseconds since 1970, of a stage in another process."""
_tracer: Final = trace.get_tracer("bt")


def span(name: str) -> AbstractContextManager[trace.Span]:
    """Return a block whose time is a span."""
    return _tracer.start_as_current_span(name)


def add(laps: Sequence[Lap]) -> None:
    """Add stages that are over as spans."""
    for name, began, ended in laps:
        _tracer.start_span(name, start_time=began).end(ended)
