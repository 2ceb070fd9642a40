"""Behind Ray Serve: bad files cost no decoder, scoring jobs wait for each other and outlive it."""

import time
import zipfile

import httpx
import psutil
import pytest

from bt_core import storage
from bt_core.scans.phantom import encode_picture, phantom_slice, write_archive
from serve.app import start
from serve.client import Client, JobTimeoutError, RequestError, ScanRefusedError
from serve.settings import ServeSettings
from tests.scan_files import deadly_dicom
from tests.tiny_bundle import make_bundle
from tests.unit.test_scan_table import BAD

pytestmark = pytest.mark.integration
TIMEOUT_SECONDS = 400


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("jobs")
    make_bundle(root / "bundle", sizes=(32,))
    (root / "in").mkdir()
    write_archive(str(root / "in" / "scans.zip"), num_per_class=3, size_px=64)
    with zipfile.ZipFile(root / "in" / "scans.zip") as whole:
        name = whole.namelist()[0]
        with zipfile.ZipFile(root / "in" / "mixed.zip", "w") as mixed:
            mixed.writestr(name, whole.read(name))
            mixed.writestr("glioma/bad.png", b"\x89PNG\r\n\x1a\n" + bytes(50))
    return root


class Served:
    """Ray Serve with the application, which can be taken down and up again."""

    def __init__(self, places):
        self.settings = ServeSettings(
            bundle=str(places / "bundle"),
            scoring_sources=(str(places / "in"),),
            scoring_outputs=(str(places / "out"),),
        )
        self.start()

    def start(self):
        from cluster.local import free_port

        self.url = start(self.settings, free_port())
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def stop(self):
        from ray import serve

        self.http.close()
        serve.shutdown()


@pytest.fixture(scope="module")
def served(ray_session, places):
    served = Served(places)
    yield served
    served.stop()


def submit(served, places, source, output, key=None, **options):
    body = {"source": f"{places}/in/{source}", "output": f"{places}/out/{output}"} | options
    headers = {} if key is None else {"Idempotency-Key": key}
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        answer = served.http.post("/v1/scoring-jobs", json=body, headers=headers)
        # Ray's dashboard is there before its agents are.
        if answer.status_code != 503 or time.monotonic() > end:
            return answer
        time.sleep(1)


def ended(served, job_id):
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        job = served.http.get(f"/v1/scoring-jobs/{job_id}").json()
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(1)
    raise AssertionError(job)


def test_a_job_outlives_serve_and_its_key_names_it(served, places):
    answer = submit(served, places, "scans.zip", "one", key="nightly")
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/scoring-jobs/{job['id']}"
    assert job["state"] in ("queued", "running")
    second = submit(served, places, "scans.zip", "two").json()
    assert second["state"] == "queued", "one at a time, as the cluster says"
    # Now, for a restart takes long enough for both jobs to be done.
    cancelled = served.http.post(f"/v1/scoring-jobs/{second['id']}/cancel")
    assert cancelled.status_code == 202
    served.stop()
    served.start()
    again = submit(served, places, "scans.zip", "one", key="nightly")
    assert (again.status_code, again.json()["id"]) == (202, job["id"])
    other = submit(served, places, "scans.zip", "one", key="nightly", overwrite=True)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert ended(served, second["id"])["state"] == "cancelled"
    done = ended(served, job["id"])
    assert done["state"] == "succeeded", done
    assert done["source"] == f"{places}/in/scans.zip"
    manifest = storage.read_json(f"{places}/out/one/manifest.json")
    assert manifest["n_in"] == done["summary"]["n_in"] == 12
    assert done["summary"].items() <= manifest.items()
    assert manifest["run_ids"] == [job["id"]]
    listed = served.http.get("/v1/scoring-jobs").json()["jobs"]
    assert [known["id"] for known in listed][-2:] == [second["id"], job["id"]]
    again = served.http.post(f"/v1/scoring-jobs/{job['id']}/cancel")
    assert again.json() == done, "what has ended stays as it is"


def test_a_bad_scan_makes_it_incomplete_and_a_missing_source_fails_it(served, places):
    job = ended(served, submit(served, places, "mixed.zip", "mixed").json()["id"])
    assert (job["state"], job["summary"]["reasons"]["corrupt_image"]) == ("incomplete", 1)
    assert job["summary"]["n_in"] == 2
    job = ended(served, submit(served, places, "none.zip", "none").json()["id"])
    assert (job["state"], job["summary"]) == ("failed", None)
    assert f"{places}/in/none.zip" in job["message"]


def test_a_running_job_is_stopped_and_goes_on_under_another_request(served, places):
    job_id = submit(served, places, "scans.zip", "stopped").json()["id"]
    end = time.monotonic() + TIMEOUT_SECONDS
    while served.http.get(f"/v1/scoring-jobs/{job_id}").json()["state"] == "queued":
        assert time.monotonic() < end
        time.sleep(0.5)
    assert served.http.post(f"/v1/scoring-jobs/{job_id}/cancel").status_code == 202
    assert ended(served, job_id)["state"] == "cancelled"
    again = ended(served, submit(served, places, "scans.zip", "stopped").json()["id"])
    assert (again["state"], again["summary"]["n_in"]) == ("succeeded", 12)


def test_other_jobs_of_the_cluster_are_not_there(served):
    from cluster.submit import own_cluster

    client = own_cluster()
    for name in ("other", "bt-scoring-" + "a" * 32):
        client.submit_job(entrypoint="true", submission_id=name)
        for answer in (
            served.http.get(f"/v1/scoring-jobs/{name}"),
            served.http.post(f"/v1/scoring-jobs/{name}/cancel"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    listed = served.http.get("/v1/scoring-jobs").json()["jobs"]
    assert "other" not in [job["id"] for job in listed]
    assert served.http.get("/v1/scoring-jobs/bt-scoring-unknown").status_code == 404
    assert served.http.get("/v1/scoring-jobs/bt-scoring-" + "b" * 32).status_code == 404


def test_the_client_submits_a_job_and_waits_for_it(served, places):
    with Client(served.url, timeout=120) as client:
        job = client.submit_scoring_job(
            f"{places}/in/scans.zip", f"{places}/out/client", idempotency_key="client"
        )
        with pytest.raises(JobTimeoutError):
            client.wait_for_job(job.id, timeout=0)
        done = client.wait_for_job(job.id, timeout=TIMEOUT_SECONDS)
        assert (done.state, done.summary["n_in"]) == ("succeeded", 12)
        assert client.cancel_scoring_job(job.id) == done
        with pytest.raises(RequestError) as caught:
            client.submit_scoring_job("/etc/hosts", f"{places}/out/hosts")
        assert caught.value.code == "not_allowed"


def decoders():
    """Return the processes that decode uploads below the gateway's replica."""
    below = psutil.Process().children(recursive=True)
    gateways = [p for p in below if "ServeReplica:bt:Gateway" in " ".join(p.cmdline())]
    children = [child for p in gateways for child in p.children(recursive=True)]
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_bad_files_get_their_reasons_and_no_decoder_is_lost(served):
    one_of_each = {reason: make for make, reason in BAD.values()}
    good = encode_picture(phantom_slice("glioma", 1, 96), ".png")
    with Client(served.url, timeout=120) as client:
        alone = client.predict(good)
        scans = [good, *(make() for make in one_of_each.values()), deadly_dicom(), good]
        answers = list(client.predict_many(scans))
        assert [a.reason for a in answers[1:-1]] == [*one_of_each, "decoder_crashed"]
        assert answers[0] == answers[-1] == alone
        with pytest.raises(ScanRefusedError) as caught:
            client.predict(deadly_dicom())
        assert caught.value.code == "decoder_crashed"
        assert client.predict(good) == alone
    assert len(decoders()) == served.settings.decoders_per_gateway
