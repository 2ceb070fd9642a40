"""S3 stores that fail, answer late or stay away: by a real server behind faults."""

import os
import pickle
import platform
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from pyarrow import fs

from bt_core import storage, stores
from bt_core.data.stream import is_streamed
from bt_core.ensemble.ensemble import Ensemble
from bt_core.errors import StoreError, UsageError
from bt_core.models.bundle import Bundle
from bt_core.scans.archives import ScanRef, list_scans, read_member, stream_members
from bt_core.scans.members import NAMED
from bt_core.store_errors import refuse_away
from tests.faulty_store import FaultyStore
from tests.tiny_bundle import make_bundle

ALL_FAULTS = (500, 503, "late", "cut", "lost")


@pytest.fixture(scope="module")
def store():
    server = FaultyStore()
    server.late_seconds = 0.2
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        yield server
    server.stop()


@pytest.fixture
def bucket(store, request):
    """The URI of a bucket of the test's own, so that no other has opened it."""
    name = request.node.name.replace("_", "-").split("[")[0][:60].strip("-")
    store.make_bucket(name)
    store.counts.clear()
    store.num_disturbed.clear()
    return f"s3://{name}"


def test_files_come_through_faults_whole(store, bucket):
    names = [f"a/b/{i:02d}.bin" for i in range(40)] + ["a/last.json"]
    with store.disturbed(0.2, *ALL_FAULTS):
        storage.each(lambda n: storage.write_bytes(f"{bucket}/{n}", n.encode() * 99), names)
        assert storage.list_files(bucket) == names
        storage.move_dir(f"{bucket}/a", f"{bucket}/c")
        moved = storage.list_files(f"{bucket}/c")
        assert moved == [name.removeprefix("a/") for name in names]
        read = storage.each(lambda n: storage.read_bytes(f"{bucket}/c/{n}"), moved)
        assert read == [name.encode() * 99 for name in names]
        storage.write_table(f"{bucket}/t/part.parquet", pa.table({"a": [1, 2]}))
        assert storage.read_table(f"{bucket}/t")["a"].to_pylist() == [1, 2]
        storage.remove_dir(f"{bucket}/c")
        assert not storage.exists(f"{bucket}/a")
        assert not storage.exists(f"{bucket}/c")
    assert set(store.num_disturbed) == set(ALL_FAULTS)


def test_a_large_file_comes_through_faults_whole(store, bucket):
    content = os.urandom(12 * 1024**2)
    with store.disturbed(0.3, 500, 503, "cut"):
        storage.write_bytes(f"{bucket}/a", content)
        assert storage.read_bytes(f"{bucket}/a") == content
        filesystem, path = storage.filesystem(f"{bucket}/a")
        with storage.open_file(filesystem, path) as file:
            assert file.seek(-99, os.SEEK_END) == len(content) - 99
            assert file.read() == content[-99:]
    assert store.num_disturbed.total()


def test_a_part_shorter_than_the_text_of_an_error_comes_through_faults(store, bucket):
    storage.write_bytes(f"{bucket}/a", b"12345")
    filesystem, path = storage.filesystem(f"{bucket}/a")
    with store.disturbed(0.3, 500, 503):
        assert storage.each(storage.read_bytes, [f"{bucket}/a"] * 16) == [b"12345"] * 16
        with storage.open_file(filesystem, path, buffer_bytes=1) as file:
            assert [file.read(1) for _ in range(5)] == [b"1", b"2", b"3", b"4", b"5"]


def test_a_small_file_takes_one_request_to_write_and_two_to_read(store, bucket):
    storage.write_json(f"{bucket}/a/b/c.json", [1])
    assert store.counts == {"PUT": 1}
    assert storage.read_json(f"{bucket}/a/b/c.json") == [1]
    assert store.counts == {"PUT": 1, "HEAD": 1, "GET": 1}
    storage.write_bytes(f"{bucket}/empty", b"")
    assert storage.read_bytes(f"{bucket}/empty") == b""


def test_a_client_keeps_its_retries_in_another_process(store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    filesystem, path = storage.filesystem(f"{bucket}/a")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    travelled = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(filesystem))))
    with store.disturbed(1.0, 503), pytest.raises(OSError, match="HTTP status 503"):
        travelled.get_file_info(path)
    assert store.counts == {"HEAD": 3}
    with travelled.open_output_stream(path) as file:
        file.write(b"x")
    assert store.counts == {"HEAD": 3, "PUT": 1}


def test_a_store_is_opened_once_for_all_its_files(bucket):
    first, path = storage.filesystem(f"{bucket}/a%20b/c")
    assert path == f"{bucket.removeprefix('s3://')}/a b/c"
    assert storage.filesystem(f"{bucket}/other")[0] is first


def test_the_query_of_a_uri_holds_for_what_is_below_it(store, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    query = store.endpoint.replace("http://", "?scheme=http&endpoint_override=")
    storage.write_json(storage.join(f"{bucket}/a{query}", "b", "c.json"), 1)
    assert storage.list_files(f"{bucket}/a{query}") == ["b/c.json"]
    assert storage.join("/data/what?", "b") == "/data/what?/b"


@pytest.mark.parametrize("given", ["0", "many"])
def test_a_wrong_number_of_attempts_is_named(bucket, monkeypatch, given):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", given)
    with pytest.raises(UsageError, match=f"AWS_MAX_ATTEMPTS={given}: give a whole number"):
        storage.filesystem(f"{bucket}-{given}/a")


def zipped(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, bytes(300_000))
    return path.read_bytes()


def test_a_store_that_stays_away_is_no_fault_of_a_scan(store, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.write_bytes(f"{bucket}/a.zip", zipped(tmp_path / "a.zip", ["0.png", "1.png"]))
    storage.write_bytes(f"{bucket}/folder/a.png", b"x")
    refs = list_scans(f"{bucket}/a.zip").refs + list_scans(f"{bucket}/folder").refs
    away = [lambda ref=ref: read_member(ref) for ref in refs]
    away += [
        lambda: list_scans(f"{bucket}/folder"),
        lambda: list_scans(f"{bucket}/list.csv"),
        lambda: is_streamed(f"{bucket}/new.tar.gz"),
        lambda: list(stream_members(f"{bucket}/new.tar.gz")),
    ]
    with store.disturbed(1.0, 503):
        for ask in away:
            with pytest.raises(StoreError, match=r"does not answer: AWS Error .* same command"):
                ask()
    assert [len(read_member(ref)) for ref in refs] == [300_000, 300_000, 1]


@pytest.mark.parametrize("status", [400, 401, 403])
def test_credentials_that_a_store_refuses_are_no_fault_of_a_scan(store, bucket, tmp_path, status):
    storage.write_bytes(f"{bucket}/a.zip", zipped(tmp_path / "a.zip", ["JOHN_DOE.png"]))
    storage.write_bytes(f"{bucket}/folder/JOHN_DOE.png", b"x")
    refs = list_scans(f"{bucket}/a.zip").refs + list_scans(f"{bucket}/folder").refs
    refs += [ScanRef("0" * 20, f"{bucket}/new.tar", "JOHN_DOE.png", 0)]
    refs += [ScanRef("0" * 20, f"{bucket}/JOHN_DOE", "JOHN_DOE.png", NAMED)]
    asks = [lambda ref=ref: read_member(ref) for ref in refs]
    asks += [lambda: list_scans(f"{bucket}/folder"), lambda: list_scans(f"{bucket}/l.csv")]
    with store.disturbed(1.0, status):
        for ask in asks:
            with pytest.raises(StoreError, match=r"credentials .*the same command again") as said:
                ask()
            assert str(said.value).startswith(f"{bucket} refuses node {platform.node()}: AWS Error")
            assert "DOE" not in str(said.value)
    assert [len(read_member(ref)) for ref in refs[:2]] == [300_000, 1]


def test_what_a_task_says_of_a_store_is_said_again():
    task = "ray::run_stage() (pid=7, ip=10.0.0.5)\n"
    kept = "s3://scans refuses node n7: AWS Error ACCESS_DENIED; give credentials"
    with pytest.raises(StoreError) as said:
        refuse_away(RuntimeError(f"{task}bt_core.errors.StoreError: {kept}\nas that says"))
    assert str(said.value) == kept
    denied = "in bucket 'scans': AWS Error ACCESS_DENIED during PutObject operation: not to DOE.png"
    with pytest.raises(StoreError, match=r"^s3://scans refuses node 10.0.0.5: AWS Error") as said:
        refuse_away(RuntimeError(f"{task}OSError: {denied}"))
    assert "DOE" not in str(said.value)


def test_a_client_that_travels_waits_for_no_request_under_way(store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    filesystem, path = storage.filesystem(f"{bucket}/a")
    travelling = pickle.dumps(filesystem)
    store.counts.clear()
    with store.disturbed(1.0, 503), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(filesystem.get_file_info, path)
        while not store.counts["HEAD"] and not asked.done():
            time.sleep(0.001)
        assert pickle.loads(travelling) is filesystem
        assert store.counts["HEAD"] < 3, "it was not waited for until the last attempt"
        with pytest.raises(OSError, match="HTTP status 503"):
            asked.result()
    assert store.counts["HEAD"] == 3


def test_a_bucket_that_several_threads_open_is_opened_once(bucket):
    begin = threading.Barrier(8)

    def open_it(_):
        begin.wait()
        return storage.filesystem(f"{bucket}/a")[0]

    with ThreadPoolExecutor(8) as pool:
        assert len({id(client) for client in pool.map(open_it, range(8))}) == 1


def test_a_client_that_travels_is_opened_once_in_a_process(bucket):
    first, second = (pickle.dumps(storage.filesystem(f"{bucket}{n}/a")[0]) for n in "12")
    assert pickle.loads(first) is pickle.loads(second) is pickle.loads(first)


def test_a_store_that_says_nothing_counts_as_away(store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(stores, "_SILENT_SECONDS", 1.0)
    monkeypatch.setattr(store, "late_seconds", 4.0)
    with store.disturbed(1.0, "late"), pytest.raises(OSError, match="1 bytes/sec") as caught:
        storage.read_json(f"{bucket}/a.json")
    with pytest.raises(StoreError, match="does not answer: AWS Error NETWORK_CONNECTION"):
        refuse_away(caught.value)


def test_the_error_of_a_store_names_it_and_no_secret(store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uri = "s3://KEY:s3cret@gone/a.json?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(OSError, match="NETWORK_CONNECTION") as caught:
        storage.read_json(uri)
    with pytest.raises(StoreError, match=r"^s3://gone does not answer: AWS Error NETW") as said:
        refuse_away(RuntimeError(f"a task failed:\n{caught.value}\nas its last line says"))
    assert "KEY" not in str(said.value)
    assert "s3cret" not in str(said.value)
    assert "\n" not in str(said.value)
    refuse_away(OSError("No space left on device"))
    refuse_away(OSError("AWS Error NO_SUCH_KEY during GetObject operation: no"))


def test_a_store_of_google_that_stays_away_is_told():
    away = "?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    with pytest.raises(OSError, match="Could not connect") as caught:
        storage.read_bytes(f"gs://anonymous@gone/a.json{away}")
    with pytest.raises(StoreError, match=r"^the store does not answer: UNAVAILABLE;"):
        refuse_away(caught.value)


def test_a_bundle_is_loaded_through_faults(store, bucket, tmp_path):
    make_bundle(tmp_path / "bundle", sizes=(32, 32))
    fs.copy_files(str(tmp_path / "bundle"), f"{bucket}/bundle")
    with store.disturbed(0.2, *ALL_FAULTS):
        bundle = Bundle(f"{bucket}/bundle")
        assert bundle.unusable == {}
        assert len(Ensemble(bundle).predictor.members) == 2
    assert store.num_disturbed.total()
