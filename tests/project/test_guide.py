"""The guide of compat: its examples print what the page says, its commands succeed."""

import re
import shlex
from pathlib import Path

import pytest
from command import invoke

pytest.importorskip("torch")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_every_block_is_of_a_kind_that_a_test_executes():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert all(line.startswith("cupycorr ") for line in COMMANDS)


def test_python_examples_print_what_the_page_says(capsys):
    namespace = {"__name__": "guide"}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), namespace)
            assert capsys.readouterr().out.splitlines() == re.findall(r"# -> (.*)", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_succeed(command):
    outcome = invoke(*shlex.split(command)[1:])
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize("statement", re.findall(r"`(from cupycorr[\w.]* import \w+[^`.]*)`", TEXT))
def test_imports_of_the_table_find_something(statement):
    exec(statement)
