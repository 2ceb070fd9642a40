"""Patient data is planted in DICOM files, and nothing that a command leaves behind may hold it."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from bt_core.scans.phantom import CLASS_NAMES, phantom_slice
from tests.conftest import bt

pytestmark = pytest.mark.integration

CANARY = "ZQXCANARY"
KEY = "a key of the site, long enough"


def planted(image_HW, patient, *, broken=False):
    """A DICOM object with the canary in every place where a person can be named."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationVersionName = CANARY
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, "1.2.3.4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.PatientName = f"{CANARY}^Name"
        dataset.PatientID = f"{CANARY}-{patient}"
        dataset.PatientBirthDate = f"{CANARY} 1950"  # pydicom's warning quotes a bad date
        dataset.PatientComments = dataset.StudyDescription = dataset.InstitutionName = CANARY
        dataset.StudyInstanceUID = f"1.2.{CANARY}"
        dataset.add_new(0x00091001, "LO", f"private {CANARY}")
        dataset.SeriesDescription = CANARY
    dataset.Modality = "MR"
    dataset.Rows, dataset.Columns = image_HW.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.PixelData = image_HW.tobytes()[: 100 if broken else None]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """12 slices of each class from 6 patients, two broken files, and objects without pixels."""
    path = tmp_path_factory.mktemp("planted") / "scans.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(CLASS_NAMES):
            for i in range(12):
                content = planted(phantom_slice(name, i, 96), f"{number}{i // 2}")
                archive.writestr(f"{name}/{i}.dcm", content)
        archive.writestr("glioma/cut.dcm", planted(phantom_slice("glioma", 50, 96), 9)[:-300])
        archive.writestr(
            "glioma/short.dcm", planted(phantom_slice("glioma", 51, 96), 9, broken=True)
        )
        without = pydicom.dcmread(io.BytesIO(planted(phantom_slice("glioma", 52, 96), 9)))
        del without.PixelData
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without.save_as(buffer)
        archive.writestr("glioma/without.dcm", buffer.getvalue())
    return path


def texts_below(folder):
    for path in Path(folder).rglob("*"):
        if path.suffix == ".parquet":
            yield path, str(pq.read_table(path, partitioning=None).to_pylist())
            yield path, str(pq.read_schema(path).metadata)
        elif path.is_file():
            yield path, path.read_bytes().decode("latin-1")


def test_no_artefact_holds_patient_data(chain, source, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("BT_HASH_KEY", KEY)
    assert CANARY.encode() in zipfile.ZipFile(source).read("glioma/0.dcm")
    assert bt("prepare", source, "-o", tmp_path / "data", "--recipe", "cnn_small") == 3
    assert bt("audit", source, "-o", tmp_path / "audit") == 3
    assert bt("explore", source, "-o", tmp_path / "explore") == 3
    assert bt("score", chain.bundle, source, "-o", tmp_path / "scores") == 3
    assert bt("score", chain.bundle, source, "-o", tmp_path / "audit" / "audit.json") in (1, 2)
    assert bt("evaluate", chain.bundle, "--data", source, "-o", tmp_path / "report") == 3
    assert (tmp_path / "report" / "explanations.parquet").exists()
    printed = "".join(capfd.readouterr())
    assert CANARY not in printed
    written = list(texts_below(tmp_path))
    assert len(written) > 15
    assert [path for path, text in written if CANARY in text] == []
    logs = list(texts_below(Path("/tmp/ray/session_latest").resolve() / "logs"))
    assert logs
    assert [path for path, text in logs if CANARY in text] == []


def test_a_patients_scans_stay_together_under_a_keyed_hash(
    ray_session, source, tmp_path, monkeypatch
):
    catalogs = {}
    for key in (KEY, KEY, "another key of another site"):
        monkeypatch.setenv("BT_HASH_KEY", key)
        data = tmp_path / f"data{len(catalogs)}{key[:3]}"
        assert bt("prepare", source, "-o", data, "--recipe", "cnn_small") == 3
        rows = pq.read_table(data / "catalog.parquet").to_pylist()
        catalogs.setdefault(key, []).append({r["member"]: r for r in rows})
    first, again = catalogs[KEY]
    other = catalogs["another key of another site"][0]
    usable = [member for member, row in first.items() if not row["reason"]]
    assert all(first[m]["patient"] == again[m]["patient"] != other[m]["patient"] for m in usable)
    assert {len(first[m]["patient"]) for m in usable} == {32}
    split_of = {}
    for member in usable:
        split_of.setdefault(first[member]["patient"], set()).add(first[member]["split"])
    assert len(split_of) == 24
    assert all(len(splits) == 1 for splits in split_of.values())
    assert np.mean([first[m]["group"] == first[m]["family"] for m in usable]) < 1
