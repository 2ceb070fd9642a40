"""Scoring jobs over HTTP without Ray: what may be named, and what is said of Ray's answers."""

import os
import posixpath
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.job_submission import JobDetails, JobStatus, JobType

from bt_core import storage
from serve.locations import NotAllowedError, allowed_output, allowed_source, resolved
from serve.ray_jobs import ScoringJobs, _record
from serve.schemas import ScoringRequest
from serve.settings import ServeSettings
from tests.hosted import client_of, tiny_hosted

PREFIXES = ("/srv/scans", "s3://scans/in")
JOB = "bt-scoring-" + "0" * 32


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32)


@pytest.mark.parametrize(
    "location",
    ["/srv/scans", "/srv/scans/a.zip", "/srv//scans/./a b/ü.tar.gz", "s3://scans/in/x/y.zip"],
)
def test_what_lies_below_a_prefix_is_a_source(location):
    assert allowed_source(location, PREFIXES).startswith(PREFIXES)


@pytest.mark.parametrize(
    "location",
    [
        "", ".", "a.zip", "~/a.zip", "/", "/srv", "/srv/scansx/a.zip", "/srv/scans/../x",
        "/srv/scans/a/..", "/srv/scans\\..\\x", "/srv/scans/a\0.zip", "/srv/scans/\ud800",
        "/srv/scans/a\n.zip", "/srv/scans/" + "a" * 3000, "file:///srv/scans/a.zip",
        "file://localhost/srv/scans/a.zip", "local:///srv/scans/a.zip", "S3://scans/in/a",
        "s3://scans/inx", "s3://scans/out/a", "s3://other/in/a", "s3://scans/in/../out",
        "s3://scans/in/./a", "s3://scans/in//a", "s3://scans/in/%2e%2e/a", "s3://key:pw@scans/in/a",
        "s3://key@scans/in/a", "s3://scans:9000/in/a", "s3://scans/in/a?endpoint_override=evil",
        "s3://scans/in/a#b", "s3:/scans/in/a", "https://scans/in/a", "simplecache::s3://scans/in/a",
        "zip://a::s3://scans/in/a.zip", "s3://scans/in/a::b", "/srv/scans/x://y", "s3://",
        "/srv/scans/list.csv", "/srv/scans/list.csv/", "/srv/scans/list.csv/.",
        "/srv/scans/LIST.Parquet", "s3://scans/in/list.tsv", "s3://scans/in/list.tsv/",
        "-o", "--help",
    ],
)  # fmt: skip
def test_what_does_not_is_none(location):
    with pytest.raises(NotAllowedError):
        allowed_source(location, PREFIXES)


def test_an_output_lies_below_a_prefix_and_is_not_one():
    assert allowed_output("/srv/scans/out", PREFIXES) == "/srv/scans/out"
    for location in (*PREFIXES, "/srv/scans/", "/srv/scans/.", "relative"):
        with pytest.raises(NotAllowedError, match=r"^output"):
            allowed_output(location, PREFIXES)


def test_links_do_not_lead_out(tmp_path):
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    (allowed / "sub").mkdir(parents=True)
    secret.mkdir()
    (allowed / "link").symlink_to(secret)
    (allowed / "sub" / "up").symlink_to("../..")
    (allowed / "loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to(allowed)
    prefixes = [str(tmp_path / "alias")]
    for name in ("link", "link/a.zip", "sub/up/secret", "sub/up"):
        with pytest.raises(NotAllowedError):
            allowed_source(str(allowed / name), prefixes)
        with pytest.raises(NotAllowedError):
            allowed_output(str(tmp_path / "alias" / name), prefixes)
    assert allowed_source(str(allowed / "sub"), prefixes) == str(allowed / "sub")
    assert allowed_source(str(tmp_path / "alias" / "sub"), prefixes) == str(allowed / "sub")


PARTS = st.sampled_from(
    ["..", ".", "", "srv", "scans", "a", "b.zip", "~", "%2e%2e", "s3:", "@", "?"]
)
PATHS = st.one_of(
    st.text(max_size=30),
    st.lists(PARTS, max_size=7).map("/".join),
    st.lists(PARTS, max_size=5).map(lambda parts: "/srv/scans/" + "/".join(parts)),
    st.lists(PARTS, max_size=5).map(lambda parts: "s3://scans/in/" + "/".join(parts)),
)


@given(PATHS)
def test_whatever_is_allowed_lies_below_a_prefix_as_the_store_sees_it(location):
    """As file systems and stores read it, which know links, escapes and queries."""
    for allow in (allowed_source, allowed_output):
        try:
            found = allow(location, PREFIXES)
        except NotAllowedError:
            continue
        assert resolved(found) == found
        if storage.is_uri(found):
            parts = urlsplit(found)
            assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == (
                "s3",
                "scans",
                "",
                "",
            )
            path = unquote(parts.path)
            assert posixpath.normpath(path) == path
            assert f"{path}/".startswith("/in/")
        else:
            assert os.path.commonpath([os.path.realpath(found), "/srv/scans"]) == "/srv/scans"


@pytest.mark.parametrize("prefix", ["scans", "file:///srv", "s3://a/../b", "s3://k:s@b/x"])
def test_a_prefix_that_is_no_location_is_refused(prefix):
    with pytest.raises(ValidationError, match="scoring_sources"):
        ServeSettings(bundle="b", scoring_sources=(prefix,))


def test_without_places_there_are_no_jobs(ensemble):
    with client_of(ensemble.hosted, scoring_sources=("/srv/scans",)) as client:
        body = {"source": "/srv/scans/a.zip", "output": "/srv/out/a"}
        for answer in (
            client.post("/v1/scoring-jobs", json=body),
            client.get("/v1/scoring-jobs"),
            client.get(f"/v1/scoring-jobs/{JOB}"),
            client.post(f"/v1/scoring-jobs/{JOB}/cancel"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (403, "not_allowed")
            assert "scoring_outputs" in answer.json()["detail"]


def test_requests_are_checked_before_ray_is_asked(ensemble):
    with client_of(
        ensemble.hosted, scoring_sources=PREFIXES, scoring_outputs=("/srv/out",)
    ) as client:
        good = {"source": "/srv/scans/a.zip", "output": "/srv/out/a"}
        for change, status, code in (
            ({"source": "/etc/passwd"}, 403, "not_allowed"),
            ({"output": "/srv/scans/a"}, 403, "not_allowed"),
            ({"source": ""}, 422, "invalid_request"),
            ({"dicom": "pdf"}, 422, "invalid_request"),
            ({"device": "cuda"}, 422, "invalid_request"),
        ):
            answer = client.post("/v1/scoring-jobs", json=good | change)
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
            assert "/srv" not in answer.text, "the operator's places are not the client's business"
        answer = client.get("/v1/scoring-jobs/..%2F..%2Fversion")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_without_a_cluster_that_takes_jobs_it_is_unavailable(ensemble, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # in other tests' Ray, too
    places = {"scoring_sources": (str(tmp_path),), "scoring_outputs": (str(tmp_path),)}
    with client_of(ensemble.hosted, **places) as client:
        body = {"source": f"{tmp_path}/a.zip", "output": f"{tmp_path}/out"}
        answer = client.post("/v1/scoring-jobs", json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "jobs_unavailable")
        assert int(answer.headers["retry-after"]) >= 1


def details(status, message="", code=None, **request):
    request = {"source": "/srv/scans/a.zip", "output": "/srv/out/a"} | request
    metadata = {
        "kind": "bt_scoring",
        "owner": "",
        "request": ScoringRequest.model_validate(request).model_dump_json(),
    }
    return JobDetails(
        type=JobType.SUBMISSION, submission_id=JOB, status=status, entrypoint="", message=message,
        start_time=1_700_000_000_123, end_time=None, metadata=metadata, driver_exit_code=code,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        (JobStatus.PENDING, None, "queued"),
        (JobStatus.RUNNING, None, "running"),
        (JobStatus.SUCCEEDED, 0, "succeeded"),
        (JobStatus.STOPPED, None, "cancelled"),
        (JobStatus.FAILED, 3, "incomplete"),
        (JobStatus.FAILED, 2, "failed"),
        (JobStatus.FAILED, None, "failed"),
    ],
)
def test_ray_states_in_words(status, code, state):
    record = _record(details(status, code=code))
    assert record.state == state
    assert record.message
    assert record.created_at.isoformat() == "2023-11-14T22:13:20.123000+00:00"


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("error: /srv/scans/a.zip does not exist", "/srv/scans/a.zip does not exist"),
        ("x\nerror: /srv/out/a/scores holds scores\ny", "/srv/out/a/scores holds scores"),
        ("error: /opt/bundle is no bundle", "could not be finished; the job's log"),
        ("error: OSError: s3://b/x (--debug shows where)", "could not be finished; the job's log"),
        ("Traceback: /usr/lib/x.py", "ended without an answer; the job's log"),
    ],
)
def test_a_failure_shows_no_path_but_those_that_were_sent(log, message):
    failed = details(JobStatus.FAILED, f"Job entrypoint command failed:\n{log}", 2)
    assert _record(failed).message.startswith(message)


def test_a_failure_names_what_was_sent_and_not_where_it_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    failed = details(
        JobStatus.FAILED, f"error: {tmp_path}/real/a is empty", 2, source=f"{tmp_path}/link/a"
    )
    assert _record(failed).message == f"{tmp_path}/link/a is empty"


def test_counts_are_those_of_the_job_and_not_of_a_later_one(tmp_path):
    settings = ServeSettings(bundle="b", scoring_outputs=(str(tmp_path),))
    job = details(JobStatus.SUCCEEDED, code=0, output=str(tmp_path / "out"))
    job.end_time = job.start_time + 60_000
    counts = {"n_in": 3, "scored": 1, "deferred": 1, "rejected": 1, "failed": 0, "reasons": {}}
    manifest = counts | {
        "is_whole": True, "bundle_id": "b", "attempts": 1, "scans_per_second": 2.0,
        "source": "/secret", "ended_at": "2023-11-14T22:14:00+00:00",
    }  # fmt: skip
    jobs = ScoringJobs(settings)
    location = str(tmp_path / "out" / "manifest.json")
    storage.write_json(location, manifest)
    summary = jobs._summary(_record(job))
    assert summary.model_dump().items() >= counts.items()
    assert "/secret" not in summary.model_dump_json()
    storage.write_json(location, manifest | {"ended_at": "2023-11-14T23:14:00+00:00"})
    assert jobs._summary(_record(job)) is None
    storage.remove_file(location)
    assert jobs._summary(_record(job)) is None
