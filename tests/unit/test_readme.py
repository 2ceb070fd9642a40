"""What the README says in tables is what the code does."""

import re
from pathlib import Path

from bt_core.errors import REASONS, REJECTED_REASONS
from bt_core.scans.gate import GATE_DEFERS
from serve.settings import ServeSettings

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def codes_by_status():
    """Return the reason codes of the README's table by what stands before them."""
    section = README.split("### Reason codes\n")[1].split("\n#")[0]
    table: dict[str, list[str]] = {}
    for first, codes in re.findall(r"^\| (.*?) \| (`.*) \|$", section, re.MULTILINE):
        status = first.split(":")[0].strip("`")
        table.setdefault(status, []).extend(re.findall(r"`(\w+)`", codes))
    return table


def test_the_reason_codes_are_those_of_the_code_under_their_status():
    table = codes_by_status()
    listed = [code for codes in table.values() for code in codes]
    assert sorted(listed) == sorted(REASONS)
    assert set(table["rejected"]) == REJECTED_REASONS
    assert set(GATE_DEFERS) < set(table["deferred"])


def test_the_limits_of_the_server_are_its_settings():
    section = README.split("| limit")[1].split("\n\n")[0]
    stated = {}
    for names, values in re.findall(r"^\| (`.*?) \| ([\d, ]+) \|", section, re.MULTILINE):
        numbers = map(float, values.split(","))
        stated |= zip(re.findall(r"`(\w+)`", names), numbers, strict=True)
    assert len(stated) == 5
    settings = ServeSettings(bundle="bundle").model_dump()
    assert stated == {name: settings[name] for name in stated}
