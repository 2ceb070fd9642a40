"""Scoring jobs that are killed, starved of disk or struck by bad scans: each row once."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import cv2
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from bt_core.data import scoring
from bt_core.data.manifest import ManifestWriter
from bt_core.data.publish import publish
from bt_core.data.score_work import ScoreJob, ScoreWork
from bt_core.errors import RunError
from bt_core.locks import locked
from bt_core.log import RUN_ID
from bt_core.scans.archives import list_scans
from bt_core.scans.phantom import phantom_slice
from bt_core.scans.preprocess import PreprocessSpec
from tests.conftest import bt, bt_process

pytestmark = pytest.mark.integration
NUM_SCANS = 1500


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip of scans that are quickly decoded, with a few that cannot be."""
    path = tmp_path_factory.mktemp("many") / "scans.zip"
    pictures = [
        cv2.imencode(".png", phantom_slice("glioma", seed, 48))[1].tobytes() for seed in range(30)
    ]
    with zipfile.ZipFile(path, "w") as file:
        for i in range(NUM_SCANS):
            file.writestr(f"{i:04d}.png", b"broken" if i % 250 == 7 else pictures[i % 30])
    return path


@pytest.fixture(scope="module")
def undisturbed(chain, archive, tmp_path_factory):
    """The rows of a job that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert bt("score", chain.bundle, archive, "-o", out) == 3
    return rows(out)


def rows(out):
    """Return the rows of a finished job without what differs between two of them."""
    table = pq.read_table(out / "scores")
    assert table["scan_id"].to_pylist() == sorted(set(table["scan_id"].to_pylist()))
    return table.drop_columns(["scored_at", "uri"])


def wait_for_rows(out, process, num=1, seconds=300):
    work, deadline = ScoreWork(str(out)), time.monotonic() + seconds
    while work.num_done() < num and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return work.num_done()


def test_a_killed_job_goes_on_and_only_with_the_same_work(chain, archive, undisturbed, tmp_path):
    out = tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, RUN_ID: "first"}
    words = ["score", chain.bundle, archive, "-o", out]
    command = [sys.executable, "-m", "jobs.score", *map(str, words[1:])]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert wait_for_rows(out, first) > 0
        first.send_signal(signal.SIGSTOP)  # or it may end while the second starts
        second = bt_process(*words, env=environment)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "another command is working" in second.stderr
    num_done = ScoreWork(str(out)).num_done()
    assert 0 < num_done < NUM_SCANS, "it was killed in the middle"
    for other in ([chain.root / "runs_bundle", archive], [chain.bundle, chain.archive]):
        if not other[0].exists():
            assert bt("ensemble", chain.runs[0], "-o", other[0]) == 0
        refused = bt_process("score", *other, "-o", out, env=environment)
        assert refused.returncode == 2
        assert "unfinished job that is other work" in refused.stderr
        assert "--overwrite" in refused.stderr
    again = bt_process(*words, env=environment | {RUN_ID: "second"})
    assert again.returncode == 3, again.stderr
    assert rows(out).equals(undisturbed)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["attempts"] == 2, "a job that is refused is no attempt"
    assert manifest["run_ids"] == ["first", "second"]
    assert pq.read_schema(out / "scores" / "part-00000.parquet").metadata[b"bt_run_id"] == b"second"
    assert manifest["n_in"] == NUM_SCANS
    assert manifest["failed"] + manifest["rejected"] == 6
    assert manifest["compute_seconds"] > 0
    assert sorted(os.listdir(out)) == ["manifest.json", "review.csv", "scores"]
    assert bt_process(*words, env=environment).returncode == 2, "a finished one is not overwritten"


def test_a_compressed_tar_is_scored_like_the_zip(chain, archive, undisturbed, tmp_path):
    source = tmp_path / "scans.tar.gz"
    with zipfile.ZipFile(archive) as members, tarfile.open(source, "w:gz") as file:
        for name in members.namelist():
            header = tarfile.TarInfo(name)
            header.size = len(members.read(name))
            file.addfile(header, io.BytesIO(members.read(name)))
    assert bt("score", chain.bundle, source, "-o", tmp_path / "out") == 3
    packed, zipped = (t.drop_columns(["position"]) for t in (rows(tmp_path / "out"), undisturbed))
    assert packed.equals(zipped)


class DeadlyScorer:
    """A scorer that ends its process on some scans, as a fault in a native runtime would."""

    def __call__(self, columns):
        members = columns["member"].tolist()
        reasons = columns["reason"].tolist()
        if any("deadly" in m for m, r in zip(members, reasons, strict=True) if not r):
            os._exit(139)
        names = {name: columns[name].tolist() for name in ("scan_id", "member", "reason")}
        return pa.table({**names, "status": ["failed" if r else "scored" for r in reasons]})


class Stillborn:
    """A scorer whose process ends while the model is loaded."""

    def __init__(self):
        os._exit(139)


@pytest.fixture
def begun(ray_session, tmp_path):
    """A job over 200 scans that was put on record; two of them are called deadly."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    content = cv2.imencode(".png", phantom_slice("glioma", 1, 48))[1].tobytes()
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as file:
        for i in range(200):
            file.writestr(f"{'deadly' if i in (20, 150) else 'good'}{i:03d}.png", content)
    work = ScoreWork(str(tmp_path / "out"))
    writer = ManifestWriter(work.manifest)
    list_scans(str(tmp_path / "scans.zip"), sink=writer)
    writer.close()
    job = ScoreJob(
        bundle_id="", source="", listing_digest="", settings={}, bt_version="", num_scans=200,
        started_at="",
    )  # fmt: skip
    work.begin(job)
    return work


SPECS = (PreprocessSpec(size_px=32),)


def test_a_scorer_that_never_comes_to_life_ends_the_job_in_one_line(begun, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_RESTARTS", 2)
    with pytest.raises(RunError, match=r"process died 2 times .* the same command goes on"):
        scoring.score_manifest(begun, SPECS, Stillborn, (), (1, 0.5, 0.0), False)


def test_scans_that_kill_the_scorer_are_set_aside_and_no_other(begun, tmp_path):
    scoring.score_manifest(begun, SPECS, DeadlyScorer, (), (2, 0.5, 0.0), False)
    published = publish(begun, str(tmp_path / "out"), 200)
    assert published.statuses == {"scored": 198, "failed": 2}
    assert published.reasons == {"": 198, "scorer_crashed": 2}
    found = pq.read_table(tmp_path / "out" / "scores").to_pylist()
    assert {r["member"] for r in found if r["reason"]} == {"deadly020.png", "deadly150.png"}


def test_a_full_disk_is_one_line_and_the_job_goes_on(
    chain, archive, undisturbed, small_disk, capfd
):
    subprocess.run(["mount", "-o", "remount,size=200k", small_disk], check=True)
    out = small_disk / "out"
    words = ["score", chain.bundle, archive, "-o", out]
    assert bt(*words) == 1
    errors = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error:")]
    assert len(errors) == 1
    assert f"{out} cannot be written (No space left on device)" in errors[0].replace("/.work", "")
    assert "make room, and the same command goes on" in errors[0]
    assert not (out / "scores").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert bt(*words) == 3
    assert rows(out).equals(undisturbed)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert bt("score", chain.bundle, archive, "-o", small_disk / "other") == 2
    assert "cannot be written (Read-only file system)" in capfd.readouterr().err


def test_overwrite_begins_anew_and_a_wrong_source_costs_nothing(chain, tmp_path):
    out = tmp_path / "out"
    assert bt("score", chain.bundle, chain.archive, "-o", out) == 0
    before = (out / "manifest.json").read_bytes()
    wrong = ["score", chain.bundle, tmp_path / "nowhere.zip", "-o", out, "--overwrite"]
    assert bt(*wrong) == 2
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(out)) == ["manifest.json", "review.csv", "scores"]
    with locked(str(out)):
        assert bt("score", chain.bundle, chain.archive, "-o", out, "--overwrite") == 2
    assert bt("score", chain.bundle, chain.archive, "-o", out, "--overwrite") == 0
    assert (out / "manifest.json").read_bytes() != before


def test_the_pipelines_bench_counts_every_scan(capfd):
    assert bt("bench", "pipeline", "--sizes", "50,400", "--json") == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [row["num_scans"] for row in figures["sizes"]] == [50, 400]
    assert all(row["scans_per_second"] > 0 for row in figures["sizes"])
    assert figures["growth"]["driver_bytes"] < 1.5


def workers_of(pid):
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
            if name.startswith("ray::") and "Agent" not in name:  # those are Ray's own
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_kills_at_random_points_leave_no_trace(chain, archive, undisturbed, tmp_path):
    """kill -9 of the driver or of a worker, then the same command until it ends, over and over."""
    seed = int(os.environ.get("BT_KILL_SEED", time.time_ns() % 10**6))
    print(f"BT_KILL_SEED={seed}")
    rng = random.Random(seed)
    words = ["-m", "jobs.score", chain.bundle, archive, "-o"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    num_kills = number = 0
    kills = {"driver": 0, "worker": 0}
    while num_kills < int(os.environ.get("BT_KILLS", "20")):
        out = tmp_path / str(number)
        command = [sys.executable, *map(str, [*words, out])]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        victim = rng.choice(["driver", "worker"])
        if rng.random() < 0.7:
            num_done = ScoreWork(str(out)).num_done()
            wait_for_rows(out, process, rng.randrange(num_done, NUM_SCANS + 1))
            seconds = rng.uniform(0, 3)
        else:
            seconds = rng.uniform(0, 40)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid).children(recursive=True)
            targets = workers_of(process.pid) if victim == "worker" else [process]
            if targets:
                rng.choice(targets).send_signal(signal.SIGKILL)
                num_kills += 1
                kills[victim] += 1
                print(f"kill {num_kills}: {victim} at {ScoreWork(str(out)).num_done()} rows")
            errors = process.communicate()[1]
            for left in family if victim == "driver" else []:  # Ray's own, some of which stay long
                if left.is_running():
                    left.kill()
        else:
            errors = process.communicate()[1]
        if process.returncode == 3 or (out / "manifest.json").exists():  # killed after its work
            assert rows(out).equals(undisturbed), f"BT_KILL_SEED={seed}"
            number += 1
        else:
            assert process.returncode == -signal.SIGKILL, errors
    last = bt_process("score", chain.bundle, archive, "-o", tmp_path / "last", env=environment)
    assert last.returncode == 3, last.stderr
    for folder in tmp_path.iterdir():
        if not (folder / "manifest.json").exists():
            again = bt_process("score", chain.bundle, archive, "-o", folder, env=environment)
            assert again.returncode == 3, again.stderr
        assert rows(folder).equals(undisturbed), f"BT_KILL_SEED={seed}"
    assert all(kills.values()), kills


LOSE_A_NODE = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from bt_core.data.score_work import ScoreWork
from jobs.cli import main

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
node = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
bundle, source, out = sys.argv[1:]

def lose():
    work = ScoreWork(out)
    while not work.num_done():
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    print("lost a node at", work.num_done(), flush=True)

threading.Thread(target=lose, daemon=True).start()
try:
    main(["score", bundle, source, "-o", out])
except SystemExit as ended:
    print("exit code", ended.code, flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_row(chain, archive, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", LOSE_A_NODE, chain.bundle, archive, out]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert "exit code 3\n" in result.stdout, result.stderr
    [at] = [int(line.split()[-1]) for line in result.stdout.splitlines() if "lost a node" in line]
    assert 0 < at < NUM_SCANS, "it was lost in the middle"
    assert rows(out).equals(undisturbed)
