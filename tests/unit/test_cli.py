"""`python -m jobs.NAME` is `bt NAME`, for every command there is."""

import runpy
import sys
from pathlib import Path

import pytest

from jobs import cli
from tests.conftest import bt

NAMES = [
    *(one.name for one in cli.app.registered_commands),
    *(group.name for group in cli.app.registered_groups),
]


def run_as_module(monkeypatch, name, *words):
    """Do in this process what `python -m jobs.NAME WORDS` does, and return its exit code."""
    path = str(Path(cli.__file__).with_name(f"{name}.py"))
    monkeypatch.setattr(sys, "argv", [path, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", NAMES)
def test_a_module_run_by_itself_is_its_command(name, monkeypatch, capsys):
    assert run_as_module(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.strip().startswith(f"Usage: bt {name} ")
    assert bt(name, "--help") == 0
    assert capsys.readouterr().out == shown


def test_the_module_of_all_commands_lists_them(monkeypatch, capsys):
    assert run_as_module(monkeypatch, "cli", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.strip().startswith("Usage: bt ")
    assert all(f"  {name} " in shown for name in NAMES)
