"""docs/troubleshooting.md explains messages that exist."""

import ast
import re

import pytest

from tests.helpers_docs import ROOT

MESSAGES = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
)
PACKAGES = ("conf", "data", "label", "train", "generate", "evaluate")


def texts() -> list[str]:
    """Every string of the program; what is filled in is a NUL."""
    strings = [(ROOT / "Makefile").read_text()]
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "") for part in node.values]
                strings.append("".join(p if isinstance(p, str) else "\0" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


TEXTS = texts()


def exists(message: str) -> bool:
    pattern = ".+?".join(re.escape(part) for part in message.split("...") if part)
    return any(re.search(pattern, text, re.DOTALL) for text in TEXTS)


def test_a_message_that_nobody_prints_is_noticed():
    assert not exists("... has no such message; allowed: ...")


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_prints_the_message(message: str):
    assert len(message.replace("...", "").strip()) >= 8
    assert exists(message)
