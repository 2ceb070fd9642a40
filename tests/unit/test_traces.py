"""Spans of requests: what takes how long, and nothing of a scan."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import StatusCode

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
    about = {"url.path": "/JOHN DOE", "http.route": "/v1/model"}
    with (
        pytest.raises(ValueError, match="DOE"),
        tracer.start_as_current_span("fails", attributes=about),
    ):
        raise ValueError("Invalid value: JOHN DOE")
    (span,) = found.spans
    assert [(a.key, a.value.string_value) for a in span.attributes] == [("http.route", "/v1/model")]
    assert span.status.code == StatusCode.ERROR.value
    assert b"DOE" not in found.received


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "http://user:SECRET@collector:4318"])
def test_a_collector_that_cannot_be_used_is_refused(url, tmp_path, tmp_path_factory):
    hosted = tiny_hosted(tmp_path_factory, 32)
    with pytest.raises(UsageError) as caught:
        run(hosted.location, port=1, traces=url)
    assert "SECRET" not in str(caught.value)
