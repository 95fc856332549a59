"""Every page is true: its commands compose, its settings, files and links are there.

Pages, commands and names are found by looking, so what is written next week is checked as well.
"""

import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any, get_args, get_type_hints

import pytest

from conf.job import Job, composed, explain
from evaluate.run import expanded
from tests import helpers_docs as docs
from tests.helpers_docs import PAGES, RECORDS, ROOT

STAGES = ("label", "train", "evaluate", "label.parity")
"""Modules whose arguments are settings."""
NEEDED = {
    "vote.votes=": ["vote.rule=at_least"],
    "vote.tie_rule=metric": ["vote.tie_metric=clip"],
    "pairs.columns.": ["pairs=parquet"],
    "panel.held_out=[image_reward": ["panel=extended"],
}
"""What a setting, by how it begins, makes sense with."""
ELSEWHERE = {
    "metrics.colour=colourful": "test_own_metric runs it, with the metric that the page adds",
}
"""Parts of commands that are not checked here, and why."""
CHECKS = [(page, line) for page in [*PAGES, *RECORDS] for line in docs.commands(page)]


def name_of(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def of_page(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=name_of)


def test_commands_are_found_where_they_are():
    found = {page.name: docs.commands(page) for page in PAGES}
    assert "make eval" in found["README.md"]
    twice = "vote.name=people_twice vote.human_votes=true vote.weights.human=2"
    assert f'make labels ARGS="{twice}"' in found["labels.md"]  # on two lines of the page
    assert any(line.startswith("srun ") and "label.workers=10" in line for line in
               found["scale-out.md"])  # fmt: skip
    assert any(line.startswith("torchrun ") for line in found["scale-out.md"])


@pytest.mark.parametrize(("page", "command"), CHECKS, ids=name_of)
def test_a_command_is_one_that_the_program_takes(page: Path, command: str):
    program = docs.program_of(command)
    assert program in docs.PROGRAMS or program in docs.UNCHECKED, "check it, or say why not"
    if program in docs.UNCHECKED or any(part in command for part in ELSEWHERE):
        return
    started = docs.started(command)
    only_flags = all(word.startswith("-") for word in command.split()[1:])  # `srun --flag=1`
    assert started or only_flags or re.search(r"make (check|lock|help|setup)", command)
    for module, *arguments in started:
        assert find_spec(module), module
        if module in STAGES:
            check_settings(arguments)
        elif module.partition(".")[0] in ("benchmarks", "data", "train"):
            check_options(module, arguments)


def check_settings(arguments: list[str]) -> None:
    words = [expanded(word) for word in arguments if not word.startswith("--")]
    flags = [word for word in arguments if word.startswith("--")]
    assert set(flags) <= {"--cfg"}
    compose(tuple(word for word in words if "=" in word))
    assert [word for word in words if "=" not in word] == ["job"] * len(flags)


@cache
def compose(overrides: tuple[str, ...]) -> None:
    """Compose and check; the stages of a command have the same settings, so once for all."""
    try:
        assert composed(overrides).folder
    except Exception as error:
        raise AssertionError(explain(error)) from error


def check_options(module: str, arguments: list[str]) -> None:
    """Options stand in the source of the module's parser."""
    place = ROOT / module.replace(".", "/")
    source = (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
    for word in arguments:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{module} has no option {word}"


# --- names in sentences --------------------------------------------------------------------------

SECTIONS = "|".join(item.name for item in fields(Job))
GROUPS = "|".join(sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir()))
ASSIGNMENTS = re.compile(
    rf"(?:(?:\+\+?)?(?:(?:{SECTIONS})\.[\w.-]+|(?:{GROUPS})(?:@[\w.]+)?|run|runs|seed)=\S+ ?)+"
)
SETTING = re.compile(rf"(?:{SECTIONS})(?:\.\w+)+")
FILE_ENDINGS = {"json", "jsonl", "tar", "zip", "index", "parquet", "csv", "tex", "html", "md", "py"}


@of_page(PAGES)
def test_settings_in_sentences_compose(page: Path):
    for span in docs.spans(page):
        if not ASSIGNMENTS.fullmatch(span) or "..." in span or "<" in span:
            continue
        words = [word.rstrip(",") for word in re.findall(r"\S+?=(?:\{[^}]*\}|\S+)", span)]
        needed = [
            more
            for start, others in NEEDED.items()
            for more in others
            if any(word.startswith(start) for word in words)
        ]
        compose(("pairs.root=/x", "evaluate.prompts.path=/x", *needed, *words))


@of_page(PAGES)
def test_settings_named_in_sentences_exist(page: Path):
    for span in docs.spans(page):
        if SETTING.fullmatch(span) and span.rpartition(".")[2] not in FILE_ENDINGS:
            assert is_setting(span) or locate(span) is not None, f"{page.name}: `{span}`"


def is_setting(name: str) -> bool:
    kind: Any = Job
    for part in name.split("."):
        if not is_dataclass(kind):
            members = get_args(kind)  # of a dict, the value's type
            if len(members) != 2:
                return False
            kind = members[1]
        elif part in (hints := get_type_hints(kind)):
            kind = hints[part]
        else:
            return False
    return True


WRITTEN = re.compile(r"train/(pipeline|lora|tensorboard|samples|step-.*)")
"""What a run writes, below its own folder."""
FOREIGN = re.compile(
    r"hpsv3/dataset/data_collator_qwen\.py|.*/(test_)?colourful\.(py|yaml)"
    r"|my_package/my_layout\.py"
)
"""Files of others, and of the metric and the layout that docs/metrics.md and pairs.md add."""


@of_page(PAGES)
def test_files_named_in_sentences_exist(page: Path):
    tops = "|".join(("docs", "conf", "tests", "benchmarks", "label", "train", "evaluate", "data"))
    for span in docs.spans(page):
        named = re.sub(r"<\w+>", "*", span.partition("::")[0])
        if FOREIGN.fullmatch(named):
            continue
        if re.fullmatch(rf"(?:{tops})/[\w./*-]+", named) and not WRITTEN.match(named):
            assert list(ROOT.glob(named.rstrip("/"))), f"{page.name}: `{span}`"
        elif re.fullmatch(r"[\w/]+\.py", named):
            assert list(ROOT.glob(f"**/{named}")), f"{page.name}: `{span}`"


@of_page(PAGES)
def test_links_lead_somewhere(page: Path):
    for link in docs.links(page):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            assert heading in docs.headings(target), f"{page.name}: {link}"
