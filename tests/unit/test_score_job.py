"""What scoring does without Ray: the manifest, the lock, what goes on, and what is published."""

import csv
import errno
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bt_core import log
from bt_core.data.manifest import PIECE_ROWS, ManifestWriter, RefDigest
from bt_core.data.publish import publish
from bt_core.data.score_work import ScoreJob, ScoreWork, device_as_begun, refuse_foreign, writing
from bt_core.data.scorer_guard import COMPUTE_SECONDS, CrashGuard, Tries
from bt_core.errors import RunError, UsageError
from bt_core.locks import locked
from bt_core.scans.archives import list_scans
from bt_core.scans.members import ScanRef
from cluster.session import Resources, _refuse_too_small
from jobs.output_folders import make_room

JOB = ScoreJob(
    bundle_id="b" * 16,
    source="/data/scans.zip",
    listing_digest="d" * 64,
    settings={"device": "cpu"},
    bt_version="1",
    num_scans=3,
    started_at="",
)


def test_a_manifest_holds_the_refs_of_a_listing_in_pieces(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(PIECE_ROWS + 5):
            archive.writestr(f"{i}.png", b"")
    refs = list_scans(str(tmp_path / "a.zip")).refs
    writer, again = ManifestWriter(str(tmp_path / "manifest")), RefDigest()
    listing = list_scans(str(tmp_path / "a.zip"), sink=writer)
    writer.close()
    list_scans(str(tmp_path / "a.zip"), sink=again)
    assert listing.refs == []
    assert listing.num_scans == len(refs) == PIECE_ROWS + 5
    assert len(list((tmp_path / "manifest").iterdir())) == 2
    rows = pq.read_table(tmp_path / "manifest").to_pylist()
    assert [ScanRef(**row) for row in rows] == refs
    assert writer.hexdigest() == again.hexdigest()
    again(ScanRef("x", "y", "z", 0))
    assert writer.hexdigest() != again.hexdigest()


def test_only_the_same_work_goes_on_and_the_message_says_what_differs(tmp_path):
    work = ScoreWork(str(tmp_path))
    assert work.begin(JOB).num_attempts == 1
    assert work.begin(JOB.model_copy(update={"started_at": "later"})).num_attempts == 2
    for name, value, said in (
        ("bundle_id", "other", "bundle_id was bbbbbbbbbbbbbbbb and is other"),
        ("settings", {"device": "cuda"}, "settings was device=cpu and is device=cuda"),
        ("listing_digest", "e" * 64, "listing_digest was dddddddd"),
        ("bt_version", "2", "bt_version was 1 and is 2"),
    ):
        with pytest.raises(UsageError, match=said) as refused:
            work.begin(JOB.model_copy(update={name: value}))
        assert "--overwrite" in str(refused.value)
    assert work.job().num_attempts == 2, "a refused job leaves no trace"
    (tmp_path / ".work" / "job.json").write_text('{"bundle": "x"}')
    with pytest.raises(UsageError, match=r"of another version.*--overwrite"):
        work.begin(JOB)


HOLD = """
import sys, time
from bt_core.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_job_and_free_when_it_is_killed(tmp_path):
    out = str(tmp_path / "out")
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another command is working"), locked(out):
            pass
        (tmp_path / "out" / "run.json").touch()
        with pytest.raises(UsageError, match="another command is working"):
            make_room(out, "run.json", "a run")
        holder.kill()
        holder.wait()
    make_room(out, "run.json", "a run")
    with locked(out):
        (tmp_path / "out" / "x").touch()
    assert os.listdir(out) == ["x"], "the lock leaves no file"


def test_a_job_that_is_to_go_on_keeps_its_device_unless_told_otherwise(tmp_path):
    out = str(tmp_path)
    assert device_as_begun(out, "auto") == "auto"
    ScoreWork(out).begin(JOB.model_copy(update={"settings": {"device": "cuda"}}))
    assert device_as_begun(out, "auto") == "cuda"
    assert device_as_begun(out, "cpu") == "cpu"


def test_a_folder_that_cannot_be_written_is_one_clear_line():
    with (
        pytest.raises(UsageError, match=r"-o /proc/nothing cannot be written \(.*\); choose"),
        locked("/proc/nothing"),
    ):
        pass
    full = pytest.raises(RunError, match=r"No space left on device.*the same command goes on")
    with full, writing("/out"):
        raise OSError(28, os.strerror(28))
    with pytest.raises(FileNotFoundError), writing("/out"):
        raise FileNotFoundError("of a source, which is no fault of the folder")


TASK = "ray::Write() (pid=7, ip=10.0.0.5)\n  File 'a.py', line 1\n"
FULL, CLOSED = os.strerror(errno.ENOSPC), os.strerror(errno.EACCES)


@pytest.mark.parametrize(
    ("folder", "error", "said"),
    [
        ("/out", PermissionError(13, CLOSED, "/out/a"), f"/out cannot be written ({CLOSED})"),
        ("/out", OSError(f"{TASK}[Errno 28] {FULL}: '/out/a'"), f"/out cannot be written ({FULL})"),
        (
            "/out",
            OSError(f"{TASK}OSError: Error writing bytes to file. Detail: [errno 28] {FULL}"),
            f"/out cannot be written ({FULL})",
        ),
        (
            "/out",
            PermissionError(13, CLOSED, "/shared/bundle/model.safetensors"),
            f"/shared/bundle/model.safetensors cannot be used on node {platform.node()} ({CLOSED})",
        ),
        (
            "/out",
            OSError(f"{TASK}OSError: [Errno 28] {FULL}: '/tmp/ray/a'"),
            f"/tmp/ray/a cannot be used on node 10.0.0.5 ({FULL})",
        ),
        (
            "/out",
            OSError(f"{TASK}OSError: [Errno 28] {FULL}"),
            f"/out or {tempfile.gettempdir()} on node 10.0.0.5 cannot be written ({FULL})",
        ),
        (
            "s3://b/out",
            OSError(28, FULL),
            f"s3://b/out or {tempfile.gettempdir()} on node {platform.node()} cannot be written",
        ),
        ("/out", PermissionError(13, CLOSED, "/outer/a"), "/outer/a cannot be used on node"),
    ],
)
def test_the_file_that_is_full_or_closed_is_the_one_that_is_named(folder, error, said):
    with pytest.raises(RunError, match=rf"^{re.escape(said)}.*same command"), writing(folder):
        raise error


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", "y"), ("manifest.json", '{"name": "my app"}'), ("review.csv", "a,b")],
)
def test_files_of_another_program_under_the_same_names_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"holds a {name} that no bt score wrote there; choose"):
        refuse_foreign(str(tmp_path), is_begun=False)


def test_what_a_finished_job_or_one_killed_at_its_end_left_is_its_own(tmp_path):
    (tmp_path / "review.csv").touch()
    refuse_foreign(str(tmp_path), is_begun=True)
    (tmp_path / "manifest.json").write_text('{"n_in": 1}')
    refuse_foreign(str(tmp_path), is_begun=False)


def make_rows(ids, **columns):
    count = len(ids)
    own = {
        "scan_id": pa.array(ids, pa.string()),
        "member": [f"{i}.png" for i in ids],
        "status": ["scored"] * count,
        "reason": [""] * count,
        "predicted_label": pa.array(["glioma"] * count, pa.string()),
        "confidence": [0.5] * count,
        COMPUTE_SECONDS: pa.array([0.25] * count, pa.float32()),
    }
    return pa.table({**own, **columns})


def make_work(tmp_path, ids, tables):
    """Return the work folder of a job over scans, with rows as Ray would have left them."""
    work = ScoreWork(str(tmp_path / "out"))
    writer = ManifestWriter(work.manifest)
    for i, scan_id in enumerate(ids):
        writer(ScanRef(scan_id, "/a.zip", f"{scan_id}.png", i))
    writer.close()
    os.makedirs(work.rows)
    for i, table in enumerate(tables):
        pq.write_table(table, f"{work.rows}/{i}.parquet")
    return work


def hex_ids(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("0123456789abcdef", k=20)) for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 5), st.integers(0, 9))
def test_parts_are_sorted_within_and_across_and_hold_each_scan_once(
    tmp_path_factory, count, part_rows, num_files, seed
):
    tmp_path, ids = tmp_path_factory.mktemp("publish"), hex_ids(count, seed)
    pieces = [ids[i::num_files] for i in range(num_files)]
    work = make_work(tmp_path, ids, [make_rows(piece) for piece in pieces if piece])
    published = publish(work, str(tmp_path / "out"), count, part_rows)
    files = [str(tmp_path / "out" / part["file"]) for part in published.parts]
    assert sorted(files) == files
    tables = [pq.ParquetFile(file).read() for file in files]
    found = [i for table in tables for i in table["scan_id"].to_pylist()]
    assert found == sorted(ids)
    assert [table.num_rows for table in tables] == [part["num_rows"] for part in published.parts]
    assert COMPUTE_SECONDS not in tables[0].column_names
    assert published.statuses == {"scored": count}
    assert published.compute_seconds == count / 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids[:-1], "1 scans have no row, 0 rows are doubled"),
        (lambda ids: [*ids, "f" * 20], "1 are of no scan"),
        (lambda ids: [*ids[:-1], ids[0]], "1 scans have no row"),
    ],
)
def test_rows_that_are_not_those_of_the_manifest_are_not_published(tmp_path, change, said):
    ids = hex_ids(50)
    work = make_work(tmp_path, ids, [make_rows(change(ids))])
    with pytest.raises(RuntimeError, match=said):
        publish(work, str(tmp_path / "out"), 50)
    assert os.listdir(tmp_path / "out") == [".work"]


def test_a_scan_that_was_scored_twice_has_one_row_if_both_say_the_same(tmp_path, lines):
    ids = hex_ids(50)
    work = make_work(tmp_path, ids, [make_rows(ids), make_rows(ids[:3])])
    assert publish(work, str(tmp_path / "out"), 50).statuses == {"scored": 50}
    assert "3 scans were scored twice, alike" in lines.text
    other = make_rows(ids[:3], status=["scored", "failed", "scored"])
    work = make_work(tmp_path / "other", ids, [make_rows(ids), other])
    with pytest.raises(RuntimeError, match="0 scans have no row, 1 rows are doubled"):
        publish(work, str(tmp_path / "other" / "out"), 50)


def test_publishing_that_was_killed_is_done_again(tmp_path):
    ids = hex_ids(50)
    work = make_work(tmp_path, ids, [make_rows(ids)])
    first = publish(work, str(tmp_path / "out"), 50, 20)
    (tmp_path / "out" / "scores" / "part-99999.parquet").touch()
    os.makedirs(work.parts)
    Path(work.parts, "part-88888.parquet").touch()
    assert publish(work, str(tmp_path / "out"), 50, 20) == first
    assert len(list((tmp_path / "out" / "scores").iterdir())) == len(first.parts) > 1


def test_what_a_person_should_look_at_is_listed_and_no_formula(tmp_path):
    ids = sorted(hex_ids(4))
    table = make_rows(
        ids,
        status=["scored", "deferred", "rejected", "failed"],
        reason=["", "low_confidence", "no_signal", "scorer_crashed"],
        member=["a.png", '=HYPERLINK("http://x")', "-1+2.png", 'quote", and\nnewline.png'],
        predicted_label=["glioma", "pituitary", None, None],
        confidence=[0.9, 0.5, None, None],
    )
    publish(make_work(tmp_path, ids, [table]), str(tmp_path / "out"), 4)
    with open(tmp_path / "out" / "review.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["scan_id"] for line in lines] == ids[1:]
    assert [line["member"] for line in lines] == [
        '\'=HYPERLINK("http://x")', "'-1+2.png", 'quote", and\nnewline.png'
    ]  # fmt: skip
    assert lines[0]["reason_in_words"] == "the models are not sure enough of their answer"
    assert (lines[0]["predicted_label"], lines[1]["predicted_label"]) == ("pituitary", "")
    assert (lines[0]["confidence"], lines[1]["confidence"]) == ("0.500", "")
    assert lines[2]["reason_in_words"] == "scoring ended its worker process twice"


def test_other_programs_read_the_parts(tmp_path):
    ids = hex_ids(200)
    lists = pa.array([["glioma", "pituitary"]] * 200, pa.list_(pa.string()))
    seen = pa.array([None] * 200, pa.bool_())
    work = make_work(tmp_path, ids, [make_rows(ids, prediction_set=lists, seen=seen)])
    publish(work, str(tmp_path / "out"), 200, 50)
    pattern = str(tmp_path / "out" / "scores" / "*.parquet")
    with duckdb.connect() as database:
        found = database.sql(f"select scan_id, prediction_set[2] from '{pattern}'").fetchall()
    assert found == [(i, "pituitary") for i in sorted(ids)]
    frame = polars.read_parquet(pattern)
    assert frame["scan_id"].to_list() == sorted(ids)
    assert frame["prediction_set"].dtype == polars.List(polars.String)


class Died(BaseException):
    """Stands for the end of a process, which no handler of errors sees."""


class DeadlyScorer:
    """A scorer that dies on scans whose id says so."""

    def __init__(self, calls):
        self._calls = calls

    def __call__(self, columns):
        ids = columns["scan_id"].tolist()
        good = [i for i, reason in zip(ids, columns["reason"], strict=True) if not reason]
        self._calls.append(ids)
        if any("deadly" in i for i in good):
            raise Died
        return pa.table({"scan_id": ids, "reason": columns["reason"].tolist()})


def test_a_scan_that_ends_the_scorer_twice_is_set_aside_and_no_other():
    ids = ["a", "deadly", "b", "deadly too", "c"]
    columns = {"scan_id": np.array(ids), "reason": np.array(["", "", "", "", "no_signal"])}
    calls, num_deaths, rows, tries = [], 0, None, Tries()
    while rows is None:  # each round is an actor that Ray has started anew
        try:
            rows = CrashGuard(DeadlyScorer, (calls,), tries)(columns)
        except Died:
            num_deaths += 1
    assert num_deaths == 5, "the batch once, each of the two scans twice by itself"
    assert rows["scan_id"].to_pylist() == ids
    assert rows["reason"].to_pylist() == [
        "", "scorer_crashed", "", "scorer_crashed", "no_signal"
    ]  # fmt: skip
    assert sum(rows[COMPUTE_SECONDS].to_pylist()) > 0
    assert tries.num_rows() == len(ids)


def test_a_batch_that_ends_well_leaves_no_record():
    columns = {"scan_id": np.array(["a", "b"]), "reason": np.array(["", ""])}
    calls, tries = [], Tries()
    for _ in range(2):  # a batch that is given again, since its rows were lost with a node
        CrashGuard(DeadlyScorer, (calls,), tries)(columns)
    assert calls == [["a", "b"], ["a", "b"]]


def test_ids_that_are_done_and_pending_stay_done(tmp_path):
    """Of a process that ended between the copy and the removal by which stores rename."""
    work = ScoreWork(str(tmp_path))
    folder = tmp_path / ".work" / "checkpoint"
    folder.mkdir(parents=True)
    ids = pa.table({"scan_id": ["a", "b"]})
    for name in ("0.parquet", "0.pending.parquet", "1.pending.parquet"):
        pq.write_table(ids, folder / name)
    work.settle()
    assert sorted(os.listdir(folder)) == ["0.parquet", "1.pending.parquet"]
    assert work.num_done() == 2


def test_progress_says_how_long_it_will_take(monkeypatch, lines):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress("scored", 1000, done=400)
    now[0] = 10.0
    progress.reach(400)
    now[0] = 19.0
    progress.reach(450)
    now[0] = 24.0
    progress.reach(500)
    now[0] = 26.0
    progress.add(10)
    assert lines.messages == [
        "scored 400 of 1000 scans",
        "scored 500 of 1000 scans (10.0/s, 50 s left)",
    ]
    assert [log.duration(s) for s in (89, 600, 3 * 3600 + 300)] == ["89 s", "10 min", "3 h 05 min"]


@pytest.mark.parametrize(
    ("num_cpus", "held", "actors"), [(2, 0.6, 1), (2, 1.5, 1), (8, 0.6, 8), (8, 6.0, 4)]
)
def test_scorers_leave_a_whole_cpu_to_what_reads_beside_an_ensemble(num_cpus, held, actors):
    found, share, _ = Resources(num_cpus, 0, 1, num_cpus, held).scorers("cpu")
    assert found == actors
    assert share > 0
    if held < num_cpus - 1.25:
        assert found * share + held <= num_cpus - 1


@pytest.mark.parametrize(
    ("num_cpus", "num_nodes", "largest", "actors", "held"),
    [(2, 1, 2, 2, 1), (8, 1, 8, 8, 4), (4, 2, 2, 4, 1), (48, 4, 16, 48, 16)],
)
def test_scorers_leave_cpus_free_even_when_the_largest_node_is_lost(
    num_cpus, num_nodes, largest, actors, held
):
    found = Resources(num_cpus, 0, num_nodes, largest).scorers("cpu")
    assert found[0] == actors
    assert found[0] * found[1] == pytest.approx(held, abs=0.03)


@pytest.mark.parametrize("num_nodes", [2, 4, 100])
@pytest.mark.parametrize("cpus", [2, 3, 8, 64])
def test_wherever_scorers_start_some_node_has_a_whole_cpu_for_a_task(num_nodes, cpus):
    actors, share, _ = Resources(num_nodes * cpus, 0, num_nodes, cpus).scorers("cpu")
    to_fill_one = int((cpus - 1) / share) + 1
    for nodes_left in (num_nodes, num_nodes - 1):  # lost actors start on the others
        assert actors < nodes_left * to_fill_one


def test_a_cluster_on_which_tasks_would_wait_for_ever_is_refused():
    """Four nodes of one CPU, with a scorer's part of it held on each, have no CPU for a task."""
    for largest in (0, 1):
        with pytest.raises(UsageError, match=f"largest of this cluster has {largest}: let"):
            _refuse_too_small(largest)
    _refuse_too_small(2)
