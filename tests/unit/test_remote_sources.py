"""The same sources at URIs: an S3 server on loopback, fsspec's memory."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from bt_core import storage, store_files
from bt_core.errors import SourceError, StoreError, UsageError
from bt_core.scans.archives import ScanRef, list_scans, read_member, stream_members
from bt_core.scans.members import NAMED
from tests.unit.sources import FILES, PACK, contents, make_zip, refusal, tar_bytes

ODD = {"glioma/a b%20#?.png": b"odd", "größe/ä.png": b"umlaut"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fs.S3FileSystem]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True)
        store.create_dir("scans")
        for name, content in (FILES | ODD).items():
            put(store, f"scans/folder/{name}", content)
        path = make_zip(tmp_path_factory.mktemp("zip") / "a.zip", list((FILES | ODD).items()))
        put(store, "scans/a.zip", path.read_bytes())
        for kind, pack in PACK.items():
            put(store, f"scans/a.{kind}", pack(tar_bytes(list((FILES | ODD).items()))))
        yield store
    server.stop()


def put(store: fs.FileSystem, path: str, content: bytes) -> None:
    with store.open_output_stream(path, compression=None) as file:
        file.write(content)


@pytest.mark.parametrize("name", ["folder", "folder/", "a.zip", "a.tar", "a.tar.gz", "a.tar.zst"])
def test_sources_on_s3_give_the_same_scans(s3: fs.S3FileSystem, name: str) -> None:
    assert contents(f"s3://scans/{name}") == FILES | ODD
    if name in ("a.tar.gz", "a.tar.zst"):
        assert {r.member: c for r, c in stream_members(f"s3://scans/{name}")} == FILES | ODD


def test_a_single_file_on_s3_is_a_source(s3: fs.S3FileSystem) -> None:
    assert contents("s3://scans/folder/glioma/a.png") == {"a.png": b"first"}


def test_a_list_on_s3_names_files_beside_it_and_elsewhere(
    s3: fs.S3FileSystem, tmp_path: Path
) -> None:
    (tmp_path / "local.png").write_bytes(b"local")
    paths = [
        "glioma/a.png",
        "s3://scans/folder/gr%C3%B6%C3%9Fe/%C3%A4.png",
        f"{tmp_path}/local.png",
        "s3://scans/folder/none.png",
    ]
    put(s3, "scans/folder/list.csv", "\n".join(["path", *paths]).encode())
    *refs, missing = list_scans("s3://scans/folder/list.csv").refs
    assert [read_member(ref) for ref in refs] == [b"first", b"umlaut", b"local"]
    assert refusal(missing).reason == "io_error"
    s3.delete_file("scans/folder/list.csv")


@pytest.mark.parametrize("uri", ["s3://scans/none", "s3://nobucket/a.zip"])
def test_a_missing_source_on_s3_is_named(s3: fs.S3FileSystem, uri: str) -> None:
    with pytest.raises(SourceError, match=f"{uri} does not exist"):
        list_scans(uri)


def test_an_object_that_vanished_is_an_io_error(s3: fs.S3FileSystem) -> None:
    put(s3, "scans/other/a.png", b"x")
    put(s3, "scans/other/b.zip", b"x")
    [ref, _] = list_scans("s3://scans/other").refs
    s3.delete_file("scans/other/a.png")
    assert refusal(ref).reason == "io_error"
    gone = (("scans/gone.zip", 0), ("scans/gone", -1), ("gone/a", -1), ("gone/a", NAMED))
    for path, position in gone:
        with pytest.raises(StoreError, match=rf"s3://{path[:4]}.* is not there; ") as caught:
            read_member(ScanRef("0" * 20, f"s3://{path}", "JOHN_DOE.png", position))
        assert "DOE" not in str(caught.value)


def test_a_row_that_names_no_object_is_an_io_error(s3: fs.S3FileSystem) -> None:
    paths = [
        "folder/none.png",
        "s3://scans/nowhere/a.png",
        "s3://scans/folder//a.png",
        "s3://scans",
    ]
    put(s3, "scans/list.csv", "\n".join(["path", *paths]).encode())
    refs = list_scans("s3://scans/list.csv").refs
    s3.delete_file("scans/list.csv")
    assert [refusal(ref).reason for ref in refs] == ["io_error"] * 4


def test_one_request_brings_many_members(
    s3: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, "scans/many.tar", tar_bytes([(f"{i}.png", b"x" * 1000) for i in range(400)]))
    reads = []
    readinto = store_files._StoreFile.readinto

    def counted(self: store_files._StoreFile, buffer: memoryview) -> int:
        reads.append(len(buffer))
        return readinto(self, buffer)

    monkeypatch.setattr(store_files._StoreFile, "readinto", counted)
    assert len(list_scans("s3://scans/many.tar").refs) == 400
    assert len(reads) <= 10


def test_fsspec_stores_are_sources(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        for name, content in FILES.items():
            memory.pipe(f"/scans/{name}", content)
        path = make_zip(tmp_path / "a.zip", list(FILES.items()))
        memory.pipe("/a.zip", path.read_bytes())
        assert contents("memory://scans") == contents("memory://a.zip") == FILES
        storage.write_json("memory://out/a.json", {"a": 1})
        assert storage.read_json("memory://out/a.json") == {"a": 1}
        assert storage.list_files("memory://out") == ["a.json"]
    finally:
        memory.store.clear()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("foo://host/a.zip", "foo.*use a local path or a URI"),
        ("sftp://user@host/a.zip", "paramiko.*use a local path"),
        ("dropbox://a.zip", "dropbox"),
    ],
)
def test_a_store_that_cannot_be_opened_says_what_is_missing(uri: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        list_scans(uri)
    assert "user@" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://KEY:ab/cd+e@bucket/a.zip", "s3://***@bucket/a.zip"),
        ("sftp://me@host/a@b.zip", "sftp://***@host/a@b.zip"),
        ("http://host:8000/a@b.zip?sig=x", "http://host:8000/a@b.zip?***"),
        ("/data/what?/a:b@c.zip", "/data/what?/a:b@c.zip"),
    ],
)
def test_only_secrets_are_left_out_of_messages(location: str, shown: str) -> None:
    assert storage.redact(location) == shown


SECRETS = [
    "s3://AKIAKEY:SECRET@bucket/dir/a.png",
    "s3://AKIAKEY:12/SECRET@bucket/a.png",
    "https://h/a.png?X-Amz-Expires=9&X-Amz-Signature=SECRET%2Bx",
    "https://h/a.png?x-goog-signature=SECRET",
    "https://h/a.png?sv=2024&sig=SECRET",
    "https://h/a.png?X%2DAmz%2DSecurity-Token=SECRET",
    "https://h/a.png?access_token=SECRET",
    "https://h/a.png?key=SECRET",
    "s3://bucket/a.png?secret_key=SECRET&region=eu-west-1",
    "s3://bucket/a.png?ACCESS_KEY=SECRET",
    "zip://a.png::https://h/a.zip?password=SECRET",
]
NO_SECRETS = [
    "s3://bucket/a:b@c.png?endpoint_override=localhost:9000&scheme=http&region=x",
    "https://h:8000/a@b.png?versionId=SECRET&design=1",
    "sftp://me@host/sig=1/a.png",
    "/data/a?sig=1.png",
]


@pytest.mark.parametrize("location", SECRETS)
def test_a_source_that_holds_a_secret_is_refused(location: str) -> None:
    with pytest.raises(UsageError, match="give credentials by the environment") as caught:
        list_scans(location)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("location", NO_SECRETS)
def test_other_queries_and_users_are_no_secrets(location: str) -> None:
    storage.refuse_secrets(location)


@pytest.mark.parametrize("location", SECRETS)
def test_a_row_that_holds_a_secret_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "l.csv").write_text(f"path\na.png\n{location}\n")
    with pytest.raises(SourceError, match=r"l\.csv, row 2 .*give credentials by the env") as caught:
        list_scans(str(tmp_path / "l.csv"))
    assert "SECRET" not in str(caught.value)


def test_a_relative_row_of_a_list_on_a_server_may_not_be_signed() -> None:
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe("/scans/l.csv", b"path\na.png?sig=SECRET\n")
        with pytest.raises(SourceError, match="row 1 "):
            list_scans("memory://scans/l.csv")
    finally:
        memory.store.clear()


def test_rows_keep_queries_that_are_no_secrets(
    s3: fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = os.environ["AWS_ENDPOINT_URL"].replace("http://", "scheme=http&endpoint_override=")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (tmp_path / "l.csv").write_text(f"path\ns3://scans/folder/glioma/a.png?{query}\n")
    [ref] = list_scans(str(tmp_path / "l.csv")).refs
    assert (ref.member, read_member(ref)) == ("a.png", b"first")


@pytest.mark.parametrize("scheme", ["s3", "http", "sftp", "foo"])
def test_passwords_are_refused_and_never_shown(scheme: str) -> None:
    uri = f"{scheme}://me:s3cret@host/a.zip"
    with pytest.raises(UsageError, match=r"\*\*\*@host/a.zip holds a password") as caught:
        list_scans(uri)
    assert "s3cret" not in str(caught.value)
    assert storage.redact(f"{uri}?X-Amz-Signature=abc") == f"{scheme}://***@host/a.zip?***"
    if scheme == "foo":
        with pytest.raises(UsageError) as caught:
            storage.filesystem(uri)
        assert "s3cret" not in str(caught.value)
