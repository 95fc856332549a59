"""docs/troubleshooting.md speaks of messages that exist; docs/README.md leads to every page."""

import ast
import re

import pytest

from tests.helpers_docs import ROOT, links

TROUBLE = ROOT / "docs" / "troubleshooting.md"
GUIDE = ROOT / "docs" / "README.md"
MESSAGES = re.findall(r"^\| `([^`]+)` \|", TROUBLE.read_text(), re.MULTILINE)
PACKAGES = ("conf", "data", "label", "train", "evaluate")


def texts() -> list[str]:
    """Every text of the program; what is filled in is a NUL."""
    found = [(ROOT / "Makefile").read_text()]
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "") for part in node.values]
                found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


def is_said(message: str) -> bool:
    pattern = ".+?".join(map(re.escape, message.split("...")))
    return any(re.search(pattern, text, re.DOTALL) for text in TEXTS)


def test_the_page_has_messages():
    assert len(MESSAGES) >= 30
    assert not is_said("... has no such message; allowed: ...")


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_programs(message: str):
    assert len(message.replace("...", "").strip()) >= 8
    assert is_said(message)


def test_the_guide_leads_to_every_page():
    pages = {path.name for path in GUIDE.parent.glob("*.md")} - {"README.md"}
    named = {link.partition("#")[0] for link in links(GUIDE)}
    assert pages <= named
    readme = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert {f"docs/{page}" for page in pages} <= readme


@pytest.mark.parametrize("column", [1, 2])
def test_what_is_known_before_is_what_the_experiments_say(column: int):
    """Of SD1.5 and of SDXL; counted anew by test_memory and test_models_guide."""
    header = (ROOT / f"conf/experiment/{['', 'sd15', 'sdxl'][column]}_pickapic.yaml").read_text()
    header = re.sub(r"\n# +", " ", header)
    memory = (ROOT / "docs" / "models.md").read_text()
    table = GUIDE.read_text().split("| | SD1.5 | SDXL | |")[1].split("\n\n")[0]
    cells = [row.split("|")[column + 1].strip() for row in table.splitlines() if "| " in row]
    assert len(cells) == 5
    plain, sharded, disk, work, hours = cells
    for text in (plain, disk, work, hours):
        assert text in header
    name = ["", "SD1.5", "SDXL"][column]
    for stage, text in ((2, plain), (3, sharded)):
        assert f"| {name} | all weights, ZeRO-{stage}, 8 GPUs | {text.split()[0]} |" in memory
