"""The keys file and the commands around it."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from bt_core.errors import ConfigError, UsageError
from serve.access import shown_key
from serve.keys import (
    KeyRing,
    add_key,
    has_expired,
    is_well_formed,
    new_key,
    read_keys,
    revoke_key,
)
from tests.conftest import bt


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "keys.json")


def test_the_file_holds_hashes_and_no_key(file):
    key = add_key(file, "clinic-a", ["predict", "explain"])
    text = Path(file).read_text()
    assert key[3:] not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    (stored,) = read_keys(file).keys
    assert (stored.name, stored.roles) == ("clinic-a", ("predict", "explain"))
    assert KeyRing(file).find(key) == stored


def test_keys_differ_and_their_form_tells_typing_errors():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(is_well_formed(key) for key in keys)


@given(st.data())
def test_a_changed_key_is_no_key(data):
    key = "bt_" + "5eed" * 16 + f"{zlib.crc32(b'5eed' * 16):08x}"
    assert is_well_formed(key)
    place = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.characters(exclude_characters=key[place]))
    assert not is_well_formed(key[:place] + other + key[place + 1 :])


TEXT = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"))


@given(st.lists(st.tuples(st.sampled_from(["Authorization", "X-API-Key", "Accept"]), TEXT)))
def test_whatever_is_sent_is_a_well_formed_key_or_none(fields):
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]
    shown = shown_key(Headers(raw=raw))
    credentials = [value for name, value in fields if name != "Accept"]
    if not credentials:
        assert shown is None
    else:
        assert shown == "" or is_well_formed(shown)


@given(
    scheme=st.sampled_from(["Bearer", "bearer", "BEARER"]),
    space=st.sampled_from([" ", "  ", " \t"]),
)
def test_a_key_is_found_in_either_header(scheme, space):
    key = new_key()
    assert shown_key(Headers({"Authorization": f"{scheme}{space}{key}"})) == key
    assert shown_key(Headers({"X-API-Key": key})) == key
    assert shown_key(Headers({"Authorization": f"Basic {key}"})) == ""
    assert shown_key(Headers({"Authorization": f"{scheme} {key}", "X-API-Key": key})) == ""


def test_a_ring_follows_its_file(file):
    first = add_key(file, "a", ["predict"])
    ring = KeyRing(file)
    second = add_key(file, "b", ["jobs"])
    assert ring.find(second).name == "b"
    revoke_key(file, "a")
    assert ring.find(first) is None
    assert ring.find(second).name == "b"


@pytest.mark.parametrize("harm", ["half", "gone", "foreign", "writable", "doubled"])
def test_a_file_that_turned_bad_leaves_the_last_good_keys(file, harm, lines):
    key = add_key(file, "a", ["predict"])
    ring = KeyRing(file)
    text = Path(file).read_text()
    if harm == "gone":
        os.unlink(file)
    elif harm == "writable":
        os.chmod(file, 0o622)
        os.utime(file, ns=(1, 1))
    else:
        found = json.loads(text)
        bad = {
            "half": text[: len(text) // 2],
            "foreign": '{"keys": [{"name": "x"}]}',
            "doubled": json.dumps({"keys": found["keys"] * 2}),
        }
        with open(file, "w") as out:
            out.write(bad[harm])
    assert ring.find(key).name == "a"
    assert ring.find(new_key()) is None
    assert sum("the last good keys stay" in line for line in lines.messages) == 1
    assert key not in lines.text
    with pytest.raises(ConfigError):
        KeyRing(file)
    if harm == "gone":
        other = add_key(file, "b", ["predict"])
        assert ring.find(other).name == "b", "a mended file counts again"
        assert ring.find(key) is None


def test_many_processes_add_keys_and_none_is_lost(file):
    script = (
        "import sys; from serve.keys import add_key; add_key(sys.argv[1], sys.argv[2], ['jobs'])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, file, f"k{i}"], cwd=os.getcwd())
        for i in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    assert sorted(key.name for key in read_keys(file).keys) == ["k0", "k1", "k2", "k3"]


def test_expiry_and_names(file):
    add_key(file, "old", ["predict"], datetime.now(UTC) - timedelta(seconds=1))
    add_key(file, "new", ["predict"], datetime.now(UTC) + timedelta(days=1))
    assert [has_expired(key) for key in read_keys(file).keys] == [True, False]
    with pytest.raises(UsageError, match="has a key 'old'"):
        add_key(file, "old", ["predict"])
    with pytest.raises(UsageError, match="has no key 'other'; it has old, new"):
        revoke_key(file, "other")
    for name, role in (("Doe John", "predict"), ("fine", "root"), ("", "jobs")):
        with pytest.raises(ConfigError):
            add_key(file, name, [role])
    with pytest.raises(ConfigError, match="does not exist"):
        revoke_key(f"{file}.other", "old")


def test_the_commands(file, capsys):
    assert bt("keys", "add", file, "--name", "a", "--role", "predict", "--role", "jobs") == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert is_well_formed(key)
    assert key not in printed.err
    assert bt("keys", "add", file, "--name", "b", "--role", "admin", "--days", "30") == 0
    capsys.readouterr()
    assert bt("keys", "list", file) == 0
    listed = capsys.readouterr().out
    assert "a: predict, jobs; since" in listed
    assert "no expiry" in listed
    assert "b: admin" in listed
    assert key not in listed
    assert bt("keys", "revoke", file, "a") == 0
    assert [entry.name for entry in read_keys(file).keys] == ["b"]
    here = ("--name", "c", "--role", "jobs", "--submit", "http://127.0.0.1:1")
    assert bt("keys", "add", file, *here) == 2
    assert "run it where the server is" in capsys.readouterr().err
    assert bt("keys", "add", file, "--name", "c", "--role", "everything") == 2
    assert "--role everything: use one of predict" in capsys.readouterr().err
