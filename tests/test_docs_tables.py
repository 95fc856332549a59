"""Tables that list everything of a kind are complete."""

import re

from benchmarks.reproduce import paper
from tests.helpers_docs import ROOT


def first_column(page: str) -> set[str]:
    return set(re.findall(r"^\| `([\w=]+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE))


def test_every_prompt_set():
    sets = {path.stem for path in (ROOT / "conf" / "prompts").glob("*.yaml")}
    named = {name for name in first_column("evaluation.md") if "=" not in name}
    assert sets - {"miniature_validation"} == named


def test_every_group_of_settings():
    groups = {path.name for path in (ROOT / "conf").iterdir() if any(path.glob("*.yaml"))}
    assert {f"{name}=" for name in groups - {"debug", "experiment", "metric"}} <= first_column(
        "settings.md"
    )


def test_every_variable_of_make():
    (names,) = re.findall(r"^VARIABLES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(names.split()) - {"VENV", "PY"} <= first_column("settings.md")


def test_every_arm_of_the_comparison():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    words = set(" ".join(re.findall(r"`([^`]*)` \|$", page, re.MULTILINE)).split())
    for arm in paper.ARMS:
        rules = {word for word in arm.overrides if word.startswith("vote=")}
        assert rules & words or set(arm.overrides) & words, arm.name
