"""The table of bad scan files through HTTP: right status, right reason, no decoder lost."""

import os

import psutil
import pytest

from bt_core.errors import REJECTED_REASONS
from tests.hosted import SCANS, client_of, tiny_hosted
from tests.scan_files import deadly_dicom
from tests.unit.test_scan_table import BAD

NUM_DECODERS = 2
STATUS_OF = {
    "unsupported_type": 415,
    "transfer_syntax_unsupported": 415,
    "image_too_large": 413,
    "member_too_large": 413,
}
"""The others are 422."""


def bad_file(name):
    """Return a file of the table as an upload, and its reason."""
    make, reason = BAD[name]
    return ("files", ("scan.dcm" if name.startswith("dicom") else "scan.png", make())), reason


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    hosted = tiny_hosted(tmp_path_factory, 32).hosted
    with client_of(hosted, decoders_per_gateway=NUM_DECODERS) as client:
        yield client


def decoders():
    children = psutil.Process(os.getpid()).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_alone_is_a_problem_with_its_reason(client, name):
    upload, reason = bad_file(name)
    answer = client.post("/v1/predictions", files=[upload])
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["code"]) == (STATUS_OF.get(reason, 422), reason)
    assert problem["detail"].startswith(f"{reason}: ")


def test_among_others_each_has_its_reason_and_the_good_one_its_answer(client):
    """Last of this file: after all that, no decoder is lost and none left over."""
    (alone,) = client.post("/v1/predictions", content=SCANS[0]).json()["results"]
    names = list(BAD)
    for start in range(0, len(names), 14):
        uploads, reasons = zip(*map(bad_file, names[start : start + 14]), strict=True)
        good, deadly = ("files", ("good.png", SCANS[0])), ("files", ("x.dcm", deadly_dicom()))
        answer = client.post("/v1/predictions", files=[good, *uploads, deadly])
        assert answer.status_code == 200, answer.text
        first, *others, last = answer.json()["results"]
        assert first == alone
        assert [result["reason"] for result in others] == list(reasons)
        for result in others:
            expected = "rejected" if result["reason"] in REJECTED_REASONS else "failed"
            assert result["status"] == expected
        assert last["reason"] == "decoder_crashed"
    assert client.post("/v1/predictions", content=SCANS[0]).json()["results"] == [alone]
    assert len(decoders()) == NUM_DECODERS
