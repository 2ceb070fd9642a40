"""What is quoted of the errors of others."""

import pytest

from bt_core.errors import first_line, last_line


@pytest.mark.parametrize("said", ["\n  one \ntwo\n three\n\n", ValueError("one\ntwo\n  three  \n")])
def test_the_first_and_the_last_line_that_say_something(said):
    assert first_line(said) == "one"
    assert last_line(said) == "three"


@pytest.mark.parametrize("line", [first_line, last_line])
def test_an_error_without_a_word_is_told_by_its_kind(line):
    assert line(ValueError()) == line(ValueError(" \n ")) == "ValueError"
    assert line("") == line(" \n ") == "no message"
