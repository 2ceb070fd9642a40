"""One id for a run of a command, in its log and for the processes that it starts."""

import os
import re
import subprocess
import sys

import pyarrow as pa
import pytest

from bt_core import storage
from bt_core.errors import UsageError
from bt_core.log import RUN_ID, run_id
from tests.conftest import bt

CHILD = "from bt_core import log; log.configure(); log.logger.info('read %d scans', 3)"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(RUN_ID, "")  # so that what is set below is undone, too
    monkeypatch.delenv(RUN_ID)


def line_of_a_child():
    return subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True
    ).stderr


def test_it_is_made_once_and_stands_in_the_log_of_child_processes():
    own = run_id()
    assert re.fullmatch(r"\d{6}-\d{6}-[0-9a-f]{6}", own)
    assert run_id() == own == os.environ[RUN_ID]
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {own} INFO read 3 scans\n", line_of_a_child())


def test_without_one_each_process_has_its_own():
    first, second = (line_of_a_child().split()[1] for _ in range(2))
    assert first != second


def test_one_may_be_given_and_is_refused_where_it_could_break_a_log(monkeypatch, capsys):
    monkeypatch.setenv(RUN_ID, "nightly_2026-11")
    assert run_id() == "nightly_2026-11"
    for wrong in ("", "two words", "line\nbreak", "x" * 65, "café"):
        monkeypatch.setenv(RUN_ID, wrong)
        with pytest.raises(UsageError, match="give 1 to 64 letters"):
            run_id()
    assert bt("recipes", "list") == 2
    assert capsys.readouterr().err.startswith("error: BT_RUN_ID=")


def test_a_table_names_its_run_and_keeps_what_it_said_before(tmp_path):
    path = str(tmp_path / "a.parquet")
    table = pa.table({"a": [1]}).replace_schema_metadata({"about": "scans"})
    storage.write_table(path, storage.with_run_id(table, "one"))
    assert storage.read_table(path).schema.metadata == {b"about": b"scans", b"bt_run_id": b"one"}
