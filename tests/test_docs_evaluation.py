"""Every command of docs/evaluation.md and docs/reproduction.md is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.reproduce.__main__ import arguments
from benchmarks.reproduce.arms import ARMS
from tests.helpers_docs import dry_run

ROOT = Path(__file__).parent.parent
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("evaluation", "reproduction")
}
COMMANDS = [
    line.strip().partition("  #")[0].strip()
    for page in PAGES.values()
    for line in page.splitlines()
    if re.match(r"    (make|python) ", line)
]


def test_there_are_commands():
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_target_and_what_it_is_given(command):
    done = dry_run(*shlex.split(command)[1:])
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert ("evaluate.fail_when_worse=true" in last) == ("GATE=1" in command)
    if "reproduce" in command:
        given = last.partition("benchmarks.reproduce")[2]
        assert arguments(shlex.split(given)).arms


def test_the_gate_can_be_switched_off():
    assert "fail_when_worse" not in dry_run("eval", "GATE=0").stdout


def test_every_prompt_set_stands_in_the_table():
    sets = {path.stem for path in (ROOT / "conf" / "prompts").glob("*.yaml")}
    named = set(re.findall(r"^\| `(\w+)` \|", PAGES["evaluation"], re.MULTILINE))
    assert sets - {"miniature_validation"} == named


def test_every_arm_stands_in_the_table():
    settings = re.findall(r"`([^`]*)` \|$", PAGES["reproduction"], re.MULTILINE)
    rules = {word for text in settings for word in text.split()}
    for arm in ARMS:
        assert {word for word in arm.overrides if word.startswith("vote=")} & rules or any(
            word in rules for word in arm.overrides
        ), arm.name
