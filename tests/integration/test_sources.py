"""Compressed tars and remote sources through Ray: the same rows as from a zip, none lost."""

import gzip
import io
import logging
import os
import random
import tarfile
import zipfile
from collections import Counter

import cv2
import pyarrow as pa
import pytest
import ray
from moto.server import ThreadedMotoServer
from pyarrow import fs

from bt_core.data import pipeline
from bt_core.data.catalog import ref_columns
from bt_core.data.decode_stage import DecodeStage
from bt_core.scans.archives import list_scans
from bt_core.scans.phantom import phantom_slice, write_archive
from tests.conftest import bt, bt_process

pytestmark = pytest.mark.integration


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def png(seed):
    return cv2.imencode(".png", phantom_slice("glioma", seed, 64))[1].tobytes()


@pytest.fixture
def s3_environment():
    """The environment of a process that finds an S3 server on loopback, with one bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    yield {**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    server.stop()


def test_a_tar_gz_on_s3_is_prepared_like_the_zip(ray_session, s3_environment, tmp_path):
    archive = tmp_path / "scans.zip"
    write_archive(str(archive), num_per_class=30, size_px=96)
    with zipfile.ZipFile(archive) as file:
        members = [(name, file.read(name)) for name in sorted(file.namelist())]
    store = fs.S3FileSystem(
        access_key="test",
        secret_key="test",
        endpoint_override=s3_environment["AWS_ENDPOINT_URL"],
        allow_bucket_creation=True,
    )
    store.create_dir("scans")
    with store.open_output_stream("scans/scans.tar.gz", compression=None) as file:
        file.write(gzip.compress(tar_of(members)))
    words = ("--recipe", "cnn_small", "-o")
    assert bt("prepare", archive, *words, tmp_path / "a") == 0
    there = bt_process(
        "prepare", "s3://scans/scans.tar.gz", *words, tmp_path / "b", env=s3_environment
    )
    assert there.returncode == 0, there.stderr
    catalogs = []
    for out in ("a", "b"):
        catalog = pa.parquet.read_table(tmp_path / out / "catalog.parquet")
        catalogs.append(catalog.drop_columns(["uri", "position"]).sort_by("scan_id").to_pylist())
    assert catalogs[0] == catalogs[1]
    assert len(catalogs[1]) == len(members)
    [shard] = (tmp_path / "b" / "views").glob("*/split=train/*.parquet")
    labels = pa.parquet.read_table(shard)["label"].to_pylist()
    assert len(labels) > 60
    assert len(set(labels[:20])) > 1, "the archive goes class by class, the shards do not"


class DeadlyStage(DecodeStage):
    """A decoder that ends its process on one scan, as a bug in a native codec would."""

    def process(self, row):
        if row["member"].endswith("deadly.png"):
            os._exit(139)
        return super().process(row)


def test_every_scan_of_mixed_sources_has_one_row(ray_session, tmp_path):
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    good = [(f"{i}.png", png(i)) for i in range(150)]
    noise = random.Random(0).randbytes(200_000)
    members = [*good[:100], ("deadly.png", png(0)), ("0.png", png(500)), ("bad.png", b"x")]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    cut = gzip.compress(tar_of([("deep/1.png", png(1)), ("deep/2.png", noise), ("3.png", b"")]))
    (tmp_path / "b.tgz").write_bytes(cut)
    (tmp_path / "c.tar").write_bytes(tar_of(good[100:]))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "z.png").write_bytes(png(900))
    sources = [str(tmp_path / name) for name in ("a.tar.gz", "b.tgz", "c.tar", "d")]
    columns = ref_columns([ref for source in sources for ref in list_scans(source).refs])
    refs = pa.table({**columns, "label": [str(i) for i in range(len(columns["scan_id"]))]})
    (tmp_path / "b.tgz").write_bytes(cut[: len(cut) // 2])  # after it was listed
    rows = pipeline.decode(refs, DeadlyStage()).take_all()
    assert Counter(row["label"] for row in rows) == Counter(refs["label"].to_pylist())
    by_label = {row["label"]: row for row in rows}
    for expected in refs.to_pylist():
        row = by_label[expected["label"]]
        assert {name: row[name] for name in expected} == expected
    assert {row["member"]: row["reason"] for row in rows if row["reason"]} == {
        "deadly.png": "decoder_crashed",
        "bad.png": "unsupported_type",
        "deep/2.png": "member_corrupt",
        "3.png": "member_corrupt",
    }
    assert "content" not in rows[0]
    doubles = [row["content_sha256"] for row in rows if row["member"] == "0.png"]
    assert len(set(doubles)) == 2
