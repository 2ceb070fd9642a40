"""Spans of requests: what takes how long, and nothing of a scan."""

from contextvars import copy_context
from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray.serve._private import tracing_utils
from ray.serve._private.proxy import HTTPProxy

from bt_core.errors import UsageError
from bt_core.inference import predictor
from jobs.serve import run
from serve import tracing
from serve.span_export import LeanExporter
from tests.collector import collector
from tests.hosted import SCANS, client_of, tiny_hosted


@pytest.fixture
def traced(monkeypatch):
    """A collector that gets the spans of this process, and their tracer."""
    with collector() as found:
        monkeypatch.setenv(tracing.ENDPOINT, found.url)
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(LeanExporter()))
        found.provider = provider
        tracer = provider.get_tracer("bt")
        monkeypatch.setattr(tracing, "_tracer", tracer)
        monkeypatch.setattr(predictor, "_tracer", tracer)
        yield found, tracer
        provider.shutdown()


def test_the_stages_of_a_scan_are_spans_and_say_nothing_of_it(traced, tmp_path_factory):
    found, _ = traced
    hosted = tiny_hosted(tmp_path_factory, 32, 48)
    found.spans.clear()  # of the members' answers while they were loaded
    with client_of(hosted.hosted) as client:
        named = [("files", ("JOHN_DOE.png", SCANS[0]))]
        assert client.post("/v1/predictions", files=named).status_code == 200
        assert client.post("/v1/predictions", content=b"JOHN DOE").status_code == 415
    names = [span.name for span in found.spans]
    stages = ["decode", "ensemble", "member m0", "member m1", "preprocess"]
    assert sorted(names) == stages, "what cannot be decoded has no stages"
    by_name = {span.name: span for span in found.spans}
    (decoded, preprocessed, ensemble) = (by_name[n] for n in ("decode", "preprocess", "ensemble"))
    assert decoded.start_time_unix_nano < decoded.end_time_unix_nano
    assert decoded.end_time_unix_nano == preprocessed.start_time_unix_nano
    assert preprocessed.end_time_unix_nano <= ensemble.start_time_unix_nano
    for name in ("member m0", "member m1"):
        assert by_name[name].parent_span_id == ensemble.span_id
    assert b"DOE" not in found.received
    assert not any(span.attributes for span in found.spans)


def test_texts_of_errors_and_addresses_stay_here(traced):
    found, tracer = traced
    about = {"url.path": "/JOHN DOE", "app": "gateway"}
    with (
        pytest.raises(ValueError, match="DOE"),
        tracer.start_as_current_span("fails", attributes=about),
    ):
        raise ValueError("Invalid value: JOHN DOE")
    (span,) = found.spans
    assert [(a.key, a.value.string_value) for a in span.attributes] == [("app", "gateway")]
    assert span.status.code == StatusCode.ERROR.value
    assert b"DOE" not in found.received


def spans_of_the_proxy(tracer, monkeypatch, path):
    """What Ray's proxy records of a request that no route takes."""
    monkeypatch.setattr(tracing_utils, "_tracing_enabled", True)
    monkeypatch.setattr(tracing_utils, "_tracer", tracer)
    proxy = HTTPProxy.__new__(HTTPProxy)  # its own would open a port
    handle = SimpleNamespace(deployment_name="Gateway", app_name="gateway")
    asked = SimpleNamespace(request_type="http", method="GET", route_path=path)
    with tracing_utils.TraceContextManager("proxy_http_request"):
        proxy._setup_http_tracing("id", handle, asked)
        proxy._finalize_http_tracing(asked, "404", False, None)


def test_the_path_that_was_asked_for_stays_here(traced, monkeypatch):
    found, _ = traced
    tracer = trace.get_tracer("ray.serve._private.tracing_utils", tracer_provider=found.provider)
    copy_context().run(spans_of_the_proxy, tracer, monkeypatch, "/v1/JOHN_DOE_1947.dcm")
    (span,) = found.spans
    assert span.name == "proxy_http_request"
    kept = {a.key: a.value.string_value for a in span.attributes}
    assert kept == {"app": "gateway", "deployment": "Gateway"}
    assert b"DOE" not in found.received


@pytest.mark.parametrize(
    ("name", "scope", "sent"),
    [
        ("route_to_replica Gateway __call__", "ray.serve", "route_to_replica"),
        ("replica_handle_request Gateway __call__", "ray.serve", "replica_handle_request"),
        ("GET /JOHN_DOE", "ray.serve", "other"),
        ("JOHN_DOE", "a library of tomorrow", "other"),
        ("POST /v1/predictions", "fastapi", "POST /v1/predictions"),
        ("member m0", "bt", "member m0"),
    ],
)
def test_names_are_sent_of_those_only_who_name_by_what_is_known(name, scope, sent, traced):
    found, _ = traced
    tracer = trace.get_tracer(scope, tracer_provider=found.provider)
    route = {"http.route": "/v1/predictions"}
    with tracer.start_as_current_span(name, attributes=route):
        pass
    (span,) = found.spans
    assert span.name == sent
    assert bool(span.attributes) == (scope == "fastapi")


def test_what_the_caller_adds_to_its_trace_stays_here(traced):
    found, tracer = traced
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "hospital=JOHN_DOE"}
    parent = TraceContextTextMapPropagator().extract(headers)
    with tracer.start_as_current_span("decode", context=parent):
        pass
    (span,) = found.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert b"DOE" not in found.received


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "http://user:SECRET@collector:4318"])
def test_a_collector_that_cannot_be_used_is_refused(url, tmp_path, tmp_path_factory):
    hosted = tiny_hosted(tmp_path_factory, 32)
    with pytest.raises(UsageError) as caught:
        run(hosted.location, port=1, traces=url)
    assert "SECRET" not in str(caught.value)
