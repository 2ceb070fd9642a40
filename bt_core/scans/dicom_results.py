"""Answers as DICOM objects in the study of the scan that they are for.

They hold the patient's identity, which the scan's own header gives: they are for the archive that
the scan came from, and nowhere else.
"""

import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import cv2
import highdicom
import numpy as np
import pydicom
from highdicom import sr
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from bt_core import __version__
from bt_core.errors import ScanError
from bt_core.scans.dicom import decode, read

Kind = Literal["sr", "sc"]
"""Structured report, or secondary capture: the slice with the answer written beside it."""

_SCHEME: Final = "99BT"
"""Private coding scheme of the classes, which are those of a dataset rather than diagnoses."""
_MR_BRAIN: Final = sr.CodedConcept("24590-2", "LN", "MR Brain")
_NOTICE: Final = "Research use only. Not a diagnosis."
_PANEL_PX: Final = 512
_NEEDED: Final = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_SERIES_NUMBER: Final = {"sr": 9001, "sc": 9002}


@dataclass(frozen=True)
class Answer:
    """What is said of one scan."""

    bundle_id: str
    predicted_label: str
    probabilities: Mapping[str, float]
    """Calibrated, by class."""
    needs_review: bool
    reason: str
    """Why a person should look; empty if none need."""
    frame_index: int
    num_frames: int


def dicom_result(content: bytes, answer: Answer, kind: Kind) -> bytes:
    """Return a DICOM object with the answer, in the study of the scan.

    Its UIDs follow from the scan's, the bundle, the kind and the answer, so that an archive that
    gets the same answer twice keeps it once, and another answer beside it.

    Args:
        content: the scan's DICOM file.
        answer: what is said of it.
        kind: structured report (TID 1500) or secondary capture.

    Raises:
        ScanError: `no_dicom_result` if the scan's header does not say which study it is of, or has
            what no object beside it may repeat; or why the scan cannot be decoded.
    """
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    make = _structured_report if kind == "sr" else _secondary_capture
    stream = io.BytesIO()
    with warnings.catch_warnings():  # they quote header values
        warnings.simplefilter("ignore")
        try:
            scan = _with_patient(read(content))
            missing = [name for name in _NEEDED if not scan.get(name)]
            if missing:
                raise ScanError("no_dicom_result", f"no {', '.join(missing)}")
            made = make(scan, content, answer)
            made.file_meta.ImplementationVersionName = f"BT {__version__}"[:16]
            pydicom.dcmwrite(stream, made, enforce_file_format=True)
        except ScanError:
            raise
        except Exception as error:  # whatever a header makes them raise; it may quote the header
            raise ScanError("no_dicom_result", type(error).__name__) from None
    return stream.getvalue()


def _with_patient(scan: pydicom.Dataset) -> pydicom.Dataset:
    """Add what an object of the study must name, empty where the scan does not say it."""
    for name in (
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
        "StudyDate", "StudyTime", "ReferringPhysicianName",
    ):  # fmt: skip
        if name not in scan:
            setattr(scan, name, "" if name != "PatientName" else None)
    return scan


def _structured_report(scan: pydicom.Dataset, content: bytes, answer: Answer) -> pydicom.Dataset:
    frames = [answer.frame_index + 1] if answer.num_frames > 1 else None
    source = sr.SourceImageForMeasurementGroup(scan.SOPClassUID, scan.SOPInstanceUID, frames)
    uid = _uid(scan, answer, "finding")
    yes_no = codes.SCT.Yes if answer.needs_review else codes.SCT.No
    evaluations = [
        sr.QualitativeEvaluation(codes.DCM.SingleImageFinding, _class_code(answer.predicted_label)),
        sr.QualitativeEvaluation(_code("review", "Needs review by a person"), yes_no),
    ]
    if answer.reason:
        reason = _code(answer.reason, answer.reason.replace("_", " "))
        evaluations.append(sr.QualitativeEvaluation(_code("reason", "Reason for review"), reason))
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=uid, identifier=f"bt {answer.bundle_id}"),
        algorithm_id=sr.AlgorithmIdentification(
            name="bt", version=__version__, parameters=[f"bundle {answer.bundle_id}", _NOTICE]
        ),
        finding_sites=[sr.FindingSite(anatomic_location=codes.SCT.Brain)],
        measurements=[
            sr.Measurement(
                name=_code(f"p_{name}", f"Probability of {name.replace('_', ' ')}"),
                value=round(float(p), 6),
                unit=codes.UCUM.NoUnits,
            )
            for name, p in answer.probabilities.items()
        ],
        qualitative_evaluations=evaluations,
        source_images=[source],
    )
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=["bt", __version__, answer.bundle_id]),
            name="bt",
            model_name=answer.bundle_id,
        ),
    )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_MR_BRAIN if scan.get("Modality") == "MR" else _code("scan", "Scan"),
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return sr.ComprehensiveSR(
        evidence=[scan],
        content=report,
        series_instance_uid=_uid(scan, answer, "sr series"),
        series_number=_SERIES_NUMBER["sr"],
        sop_instance_uid=_uid(scan, answer, "sr"),
        instance_number=1,
        manufacturer="bt",
        is_complete=True,
        is_final=False,
        series_description="bt: classification (research use only)",
    )


def _secondary_capture(scan: pydicom.Dataset, content: bytes, answer: Answer) -> pydicom.Dataset:
    capture = highdicom.sc.SCImage.from_ref_dataset(
        ref_dataset=scan,
        pixel_array=_drawn(decode(content).image_HW, answer),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        series_instance_uid=_uid(scan, answer, "sc series"),
        series_number=_SERIES_NUMBER["sc"],
        sop_instance_uid=_uid(scan, answer, "sc"),
        instance_number=1,
        manufacturer="bt",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    capture.SeriesDescription = "bt: classification (research use only)"
    stated = str(scan.get("BurnedInAnnotation") or "").strip().upper()
    if "YES" in stated or answer.reason == "burnt_in_text":
        capture.BurnedInAnnotation = "YES"
    elif stated == "NO":
        capture.BurnedInAnnotation = "NO"
    capture.DerivationDescription = f"bt {__version__}, bundle {answer.bundle_id}. {_NOTICE}"
    # Of the slice the capture shows no orientation: what stands beside it has none.
    capture.add_new("PatientOrientation", "CS", None)
    return capture


def _drawn(image_HW: np.ndarray, answer: Answer) -> np.ndarray:
    """Return RGB uint8: the slice, and beside it the answer in words and bars."""
    height, width = image_HW.shape
    scale = _PANEL_PX / max(height, width)
    slice_HW = cv2.resize(image_HW, (max(1, round(width * scale)), max(1, round(height * scale))))
    canvas_HW3 = np.zeros((_PANEL_PX, 2 * _PANEL_PX, 3), np.uint8)
    canvas_HW3[: slice_HW.shape[0], : slice_HW.shape[1]] = slice_HW[..., None]
    verdict = "for review" if answer.needs_review else "no review needed"
    _write(canvas_HW3, answer.predicted_label.replace("_", " "), 60, 1.1)
    _write(
        canvas_HW3,
        f"{verdict}{': ' * bool(answer.reason)}{answer.reason.replace('_', ' ')}",
        95,
        0.55,
    )
    for place, (name, p) in enumerate(answer.probabilities.items()):
        top = 140 + 50 * place
        _write(canvas_HW3, f"{name.replace('_', ' ')} {p:.1%}", top, 0.55)
        left = _PANEL_PX + 20
        cv2.rectangle(canvas_HW3, (left, top + 8), (left + 440, top + 22), (60, 60, 60), -1)
        end = left + round(440 * float(p))
        cv2.rectangle(canvas_HW3, (left, top + 8), (end, top + 22), (90, 170, 240), -1)
    if answer.num_frames > 1:
        shown = f"slice {answer.frame_index + 1} of {answer.num_frames}"
        _write(canvas_HW3, shown, _PANEL_PX - 80, 0.5)
    _write(canvas_HW3, f"bundle {answer.bundle_id}", _PANEL_PX - 50, 0.5)
    _write(canvas_HW3, _NOTICE, _PANEL_PX - 20, 0.5)
    return canvas_HW3


def _write(canvas_HW3: np.ndarray, text: str, baseline: int, size: float) -> None:
    place, white = (_PANEL_PX + 20, baseline), (255, 255, 255)
    cv2.putText(canvas_HW3, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, white, 1, cv2.LINE_AA)


def _class_code(name: str) -> sr.CodedConcept:
    return _code(name, name.replace("_", " "))


def _code(value: str, meaning: str) -> sr.CodedConcept:
    return sr.CodedConcept(value, _SCHEME, meaning)


def _uid(scan: pydicom.Dataset, answer: Answer, what: str) -> UID:
    """Return a UID that follows from the scan's and the answer; of a series, from the scan's."""
    if what.endswith("series"):
        return generate_uid(entropy_srcs=[str(scan.SeriesInstanceUID), answer.bundle_id, what])
    said = f"{answer.predicted_label} {answer.reason} {sorted(answer.probabilities.items())}"
    return generate_uid(entropy_srcs=[str(scan.SOPInstanceUID), answer.bundle_id, what, said])
