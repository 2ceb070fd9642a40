"""The audit log: every scan accounted for, nothing of a patient, and no answer without a line."""

import contextlib
import hashlib
import json
import os
import stat

import numpy as np
import pytest

from bt_core.errors import UsageError
from bt_core.scans.phantom import phantom_slice
from serve.access import require
from serve.access_log import AuditLog
from serve.keys import add_key
from tests.hosted import SCANS, bearer, client_of, files, tiny_hosted
from tests.scan_files import dicom_object

CANARY = "CANARY"
LINE_FIELDS = {
    "time", "request_id", "key", "address", "method", "route", "http_status", "seconds",
    "content_sha256", "status", "reason", "predicted_label", "confidence", "bundle_id",
}  # fmt: skip


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    return tiny_hosted(tmp_path_factory, 32)


@pytest.fixture
def keys(tmp_path):
    file = str(tmp_path / "keys.json")
    return file, {name: add_key(file, name, [name]) for name in ("predict", "jobs")}


def added(api):
    @api.post("/v1/things/{name}", dependencies=[require("jobs")])
    async def things(name: str):
        return {"name": name}

    @api.get("/v1/things/{name}", dependencies=[require("jobs")])
    async def thing(name: str):
        return {"name": name}


def lines_of(folder, kind="audit"):
    paths = sorted(folder.glob(f"{kind}-*"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_every_scan_has_a_line_and_no_line_names_a_patient(ensemble, keys, tmp_path):
    stored = phantom_slice("glioma", 1, 96).astype(np.uint16) * 16
    dicom = dicom_object(stored, PatientName=f"{CANARY}^Name", PatientID=CANARY)
    sent = [(f"{CANARY}.dcm", dicom), (f"{CANARY}.png", SCANS[0]), (f"{CANARY}.x", b"no scan")]
    folder, key = tmp_path / "audit", keys[1]["predict"]
    settings = {"keys": keys[0], "audit_dir": str(folder)}
    with client_of(ensemble.hosted, added, **settings) as client:
        answer = client.post(
            f"/v1/predictions?patient={CANARY}",
            files=[("files", file) for file in sent],
            headers={**bearer(key), "User-Agent": CANARY, "X-Request-ID": f"{CANARY}^Name"},
        )
        assert answer.status_code == 200, answer.text
        refused = client.post("/v1/predictions", content=b"no scan", headers=bearer(key))
        client.get(f"/v1/{CANARY}", headers=bearer(key))
        client.post(f"/v1/{CANARY}", headers=bearer(key))
        client.post(f"/v1/things/{CANARY}", headers=bearer(keys[1]["jobs"]))
        client.get(f"/v1/{CANARY}")
    lines = lines_of(folder)
    assert len(lines) == 6
    for line, (_, content), result in zip(lines, sent, answer.json()["results"], strict=False):
        assert line.keys() <= LINE_FIELDS
        assert line["content_sha256"] == hashlib.sha256(content).hexdigest()
        assert (line["key"], line["http_status"]) == ("predict", 200)
        assert (line["method"], line["route"]) == ("POST", "/v1/predictions")
        for field in ("status", "reason", "predicted_label", "confidence", "bundle_id"):
            assert line.get(field) == result.get(field)
        assert line["time"].endswith("+00:00")
        assert line["seconds"] > 0
    assert lines[3]["request_id"] == refused.headers["x-request-id"]
    assert (lines[3]["http_status"], lines[3]["reason"]) == (415, "unsupported_type")
    assert [line["route"] for line in lines[4:]] == ["", "/v1/things/{name}"]
    (denied,) = lines_of(folder, "denied")
    assert (denied["key"], denied["http_status"]) == ("", 401)
    assert denied["address"]
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert CANARY.encode() not in everything
    assert key.encode() not in everything
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())


def test_what_was_refused_for_other_reasons_has_a_line(ensemble, keys, tmp_path):
    folder = tmp_path / "audit"
    headers = bearer(keys[1]["predict"])
    settings = {"keys": keys[0], "audit_dir": str(folder)}
    limits = {"max_scans_per_minute": 2, "max_files": 2}
    with client_of(ensemble.hosted, added, **settings, **limits) as client:
        client.post("/v1/predictions", content=SCANS[0], headers=bearer(keys[1]["jobs"]))
        ensemble.is_there = False
        try:
            client.post("/v1/predictions", content=SCANS[0], headers=headers)
        finally:
            ensemble.is_there = True
        client.post("/v1/predictions", files=files(*SCANS[:2]), headers=headers)
        client.get("/v1/model", headers=headers)
        client.get("/v1/things/x", headers=headers)
    assert [(line["key"], line["http_status"]) for line in lines_of(folder)] == [
        ("jobs", 403),
        ("predict", 503),
        ("predict", 429),
        ("predict", 403),
    ]


def test_without_keys_there_are_lines_too(ensemble, tmp_path):
    folder = tmp_path / "audit"
    with client_of(ensemble.hosted, audit_dir=str(folder)) as client:
        client.post("/v1/predictions", content=SCANS[0])
    (line,) = lines_of(folder)
    assert (line["key"], line["address"]) == ("", "testclient")


def test_files_are_rotated_and_strangers_push_nothing_out(ensemble, keys, tmp_path):
    folder = tmp_path / "audit"
    settings = {"keys": keys[0], "audit_dir": str(folder)}
    sizes = {"audit_file_mib": 1000 / 1024**2, "audit_num_files": 2}
    with client_of(ensemble.hosted, **settings, **sizes) as client:
        client.post("/v1/predictions", content=SCANS[0], headers=bearer(keys[1]["predict"]))
        for _ in range(20):
            client.get("/v1/model")
    assert len(list(folder.glob("denied-*"))) == 3
    assert all(path.stat().st_size <= 1000 for path in folder.glob("denied-*"))
    assert 5 <= len(lines_of(folder, "denied")) < 20
    assert len(lines_of(folder)) == 1


def test_two_gateways_write_to_files_of_their_own(tmp_path):
    logs = [AuditLog(str(tmp_path), 1000, 1) for _ in range(2)]
    for number, log in enumerate(logs):
        log.write([{"number": number}], of_stranger=False)
    assert [len(path.read_text()) for path in sorted(tmp_path.glob("audit-*"))] == [13, 13]
    logs[0].close()
    again = AuditLog(str(tmp_path), 1000, 1)
    again.write([{"number": 2}], of_stranger=False)
    assert len(list(tmp_path.glob("audit-*"))) == 2, "a restart goes on with a file"
    for log in (logs[1], again):
        log.close()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        AuditLog(str(tmp_path / "file"), 1000, 1)


def fill(path):
    """Write to a file until its disk is full."""
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(4096)):
            pass


def test_a_full_disk_gives_no_answer_and_no_half_line(ensemble, keys, small_disk, lines):
    folder, filler = small_disk / "audit", small_disk / "filler"
    headers = bearer(keys[1]["predict"])
    settings = {"keys": keys[0], "audit_dir": str(folder)}
    with client_of(ensemble.hosted, **settings) as client:
        ask = dict(content=SCANS[0], headers=headers)
        assert client.post("/v1/predictions", **ask).status_code == 200
        fill(filler)
        while (answer := client.post("/v1/predictions", **ask)).status_code == 200:
            pass  # the page that holds the last line has room for some more
        assert (answer.status_code, answer.json()["code"]) == (503, "not_audited")
        assert "predicted_label" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/v1/model", headers=headers).status_code == 200
        before = len(lines_of(folder))
        assert "the audit log cannot be written: No space left on device" in lines.messages
        os.unlink(filler)
        assert client.post("/v1/predictions", **ask).status_code == 200
    assert len(lines_of(folder)) == before + 1
