"""Answers as DICOM objects, read back by the library that others read them with."""

import io
import warnings
from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from bt_core.errors import ScanError
from bt_core.scans.dicom_results import Answer, dicom_result

ANSWER = Answer(
    bundle_id="0123456789abcdef",
    predicted_label="no_tumor",
    probabilities={"glioma": 0.25, "meningioma": 0.05, "no_tumor": 0.6, "pituitary": 0.1},
    needs_review=True,
    reason="tumor_not_excluded",
    frame_index=0,
    num_frames=1,
)


@pytest.fixture
def scan():
    with open(get_testdata_file("MR_small.dcm"), "rb") as file:
        return file.read()


def changed(content, **values):
    dataset = pydicom.dcmread(io.BytesIO(content))
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in values.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        pydicom.dcmwrite(stream, dataset)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_a_result_is_in_the_study_of_its_scan_and_the_same_each_time(scan, kind):
    source = pydicom.dcmread(io.BytesIO(scan))
    once, again = (pydicom.dcmread(io.BytesIO(dicom_result(scan, ANSWER, kind))) for _ in range(2))
    for name in ("StudyInstanceUID", "PatientID", "PatientName", "StudyDate"):
        assert once.get(name) == source.get(name), name
    assert once.SeriesInstanceUID != source.SeriesInstanceUID
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert once[name].value == again[name].value
        other = replace(ANSWER, bundle_id="f" * 16)
        newer = pydicom.dcmread(io.BytesIO(dicom_result(scan, other, kind)))
        assert newer[name].value != once[name].value
    sure = replace(ANSWER, predicted_label="glioma", needs_review=False, reason="")
    changed_mind = pydicom.dcmread(io.BytesIO(dicom_result(scan, sure, kind)))
    assert changed_mind.SOPInstanceUID != once.SOPInstanceUID, "an archive keeps the first"
    assert changed_mind.SeriesInstanceUID == once.SeriesInstanceUID
    both = [pydicom.dcmread(io.BytesIO(dicom_result(scan, ANSWER, k))) for k in ("sr", "sc")]
    assert both[0].SeriesInstanceUID != both[1].SeriesInstanceUID


def test_a_structured_report_says_the_answer_and_what_it_is_of(scan):
    report = highdicom.sr.srread(io.BytesIO(dicom_result(scan, ANSWER, "sr")))
    (group,) = report.content.get_image_measurement_groups()
    found = {m.name.meaning: float(m.value) for m in group.get_measurements()}
    assert found == {
        "Probability of glioma": 0.25, "Probability of meningioma": 0.05,
        "Probability of no tumor": 0.6, "Probability of pituitary": 0.1,
    }  # fmt: skip
    said = {q.name.meaning: q.value for q in group.get_qualitative_evaluations()}
    assert said["Single Image Finding"].value == "no_tumor"
    assert said["Needs review by a person"].meaning == "Yes"
    assert said["Reason for review"].value == "tumor_not_excluded"
    (image,) = group.source_images
    source = pydicom.dcmread(io.BytesIO(scan))
    assert image.referenced_sop_instance_uid == source.SOPInstanceUID
    sure = replace(ANSWER, needs_review=False, reason="", frame_index=4, num_frames=9)
    report = highdicom.sr.srread(io.BytesIO(dicom_result(scan, sure, "sr")))
    (group,) = report.content.get_image_measurement_groups()
    said = {q.name.meaning: q.value.meaning for q in group.get_qualitative_evaluations()}
    assert said == {"Single Image Finding": "no tumor", "Needs review by a person": "No"}
    assert group.source_images[0].referenced_frame_numbers == [5], "counted from 1"


def test_a_secondary_capture_shows_the_slice_and_the_answer(scan):
    capture = pydicom.dcmread(io.BytesIO(dicom_result(scan, ANSWER, "sc")))
    picture = capture.pixel_array
    assert picture.shape == (512, 1024, 3)
    assert picture[:, :512].std() > 10, "the slice"
    assert picture[:, 512:].max() == 255, "words"
    bars = (picture[:, 512:] == (90, 170, 240)).all(-1)
    widths = [int(bars[140 + 50 * place + 15].sum()) for place in range(4)]
    np.testing.assert_allclose(widths, 440 * np.array([0.25, 0.05, 0.6, 0.1]), atol=2)
    assert "BurnedInAnnotation" not in capture, "nobody has said that there is none"
    stated = changed(scan, BurnedInAnnotation="NO")
    assert (
        pydicom.dcmread(io.BytesIO(dicom_result(stated, ANSWER, "sc"))).BurnedInAnnotation == "NO"
    )
    found = replace(ANSWER, reason="burnt_in_text")
    seen = pydicom.dcmread(io.BytesIO(dicom_result(stated, found, "sc")))
    assert seen.BurnedInAnnotation == "YES"
    marked = changed(scan, BurnedInAnnotation="YES")
    kept = pydicom.dcmread(io.BytesIO(dicom_result(marked, ANSWER, "sc")))
    assert kept.BurnedInAnnotation == "YES"


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_a_header_that_does_not_say_its_study_is_an_error_without_values(scan, kind, recwarn):
    nameless = changed(scan, StudyInstanceUID=None, PatientName="CANARY^JANE")
    with pytest.raises(ScanError, match="no StudyInstanceUID") as caught:
        dicom_result(nameless, ANSWER, kind)
    odd = changed(scan, PatientName="CANARY^JANE", StudyDate="CANARY", PatientBirthDate="CANARY")
    with pytest.raises(ScanError) as odd_caught:
        dicom_result(odd, ANSWER, kind)
    assert "CANARY" not in str(caught.value) + str(odd_caught.value)
    assert not [w for w in recwarn if "CANARY" in str(w.message)]


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_no_header_ends_a_job_or_is_quoted(scan, kind):
    """A VR that does not exist decodes, and nothing can be written beside it."""
    at = scan.index(b"\x08\x00\x90\x00")
    broken = scan[: at + 4] + b"PQ" + scan[at + 6 :]
    with pytest.raises(ScanError) as caught:
        dicom_result(broken, ANSWER, kind)
    assert caught.value.reason == "no_dicom_result"
    with pytest.raises(ScanError) as caught:
        dicom_result(changed(scan, PatientSex="CANARY"), ANSWER, kind)
    assert caught.value.reason == "no_dicom_result"
    assert "CANARY" not in str(caught.value)


def test_a_study_without_a_patients_name_gets_its_result_too(scan):
    bare = changed(scan, PatientName=None, PatientID=None, AccessionNumber=None, StudyID=None)
    for kind in ("sr", "sc"):
        assert pydicom.dcmread(io.BytesIO(dicom_result(bare, ANSWER, kind))).PatientID in ("", None)
