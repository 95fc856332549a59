"""Every page is true: its commands compose, and the settings, files and links it names exist.

Pages, commands and names are collected from the files, so new ones are checked, too.
"""

import ast
import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from conf.job import Job, composed, explain
from evaluate.run import expanded
from tests import helpers_docs as docs
from tests.helpers_docs import HEADERS, PAGES, ROOT

STAGES = ("generate", "label", "train", "evaluate", "evaluate.rounds", "label.parity")
"""Modules whose arguments are settings."""
NEEDED = {
    "vote.votes=": ["vote.rule=at_least"],
    "vote.tie_rule=metric": ["vote.tie_metric=clip"],
    "pairs.columns.": ["pairs=parquet"],
    "+preset=": ["model=sdxl"],
    "panel.held_out=[image_reward": ["panel=extended"],
}
"""Settings that another one, by how it begins, needs beside it."""
ELSEWHERE = {
    "metrics.colour=colourful": "test_own_metric runs it, with the metric that the page adds",
}
"""Parts of commands that are not checked here, and why."""
CHECKS = [(page, line) for page in [*PAGES, *HEADERS] for line in docs.commands(page)]


def name_of(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def of_page(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=name_of)


def test_commands_are_collected_from_blocks_and_sentences():
    lines = {name_of(page): docs.commands(page) for page in [*PAGES, *HEADERS]}
    assert "make eval" in {line.partition("  #")[0].strip() for line in lines["README.md"]}
    twice = "vote.name=people_twice vote.human_votes=true vote.weights.human=2"
    assert f'make labels ARGS="{twice}"' in lines["docs/labels.md"]  # on two lines of the page
    assert any(line.startswith("srun ") for line in lines["docs/scale-out.md"])
    assert any(line.startswith("torchrun ") for line in lines["docs/scale-out.md"])
    for path in (ROOT / "examples").glob("*.py"):
        assert lines[name_of(path)], path


def test_the_gate_is_a_variable_of_make():
    assert "evaluate.fail_when_worse=true" in docs.dry_run("eval", "GATE=1").stdout
    for words in (["eval"], ["eval", "GATE=0"]):
        assert "fail_when_worse" not in docs.dry_run(*words).stdout


@pytest.mark.parametrize(("page", "command"), CHECKS, ids=name_of)
def test_a_command_is_one_that_the_program_takes(page: Path, command: str):
    program = docs.program_of(command)
    assert program in docs.PROGRAMS or program in docs.UNCHECKED, "check it, or say why not"
    if program in docs.UNCHECKED or any(part in command for part in ELSEWHERE):
        return
    started = docs.started(command)
    only_flags = all(word.startswith("-") for word in command.split()[1:])  # `srun --flag=1`
    assert started or only_flags or re.search(r"make (check|docs|lock|help|setup)", command)
    for module, *arguments in started:
        assert find_spec(module), module
        if module in STAGES:
            check_settings(arguments)
        elif module.partition(".")[0] in ("benchmarks", "data", "examples", "train"):
            check_options(module, arguments)


def check_settings(arguments: list[str]) -> None:
    words = [expanded(word) for word in arguments if not word.startswith("--")]
    flags = [word for word in arguments if word.startswith("--")]
    assert set(flags) <= {"--cfg"}
    compose(tuple(word for word in words if "=" in word))
    assert [word for word in words if "=" not in word] == ["job"] * len(flags)


@cache
def compose(overrides: tuple[str, ...]) -> None:
    """Compose and check; the stages of a command have the same settings and share the answer."""
    try:
        assert composed(overrides).folder
    except Exception as error:
        raise AssertionError(explain(error)) from error


def check_options(module: str, arguments: list[str]) -> None:
    """The source of the module's parser has every option."""
    place = ROOT / module.replace(".", "/")
    source = (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
    for word in arguments:
        if word.startswith("--") and word != "--help":
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
    """Composed together, a quarter of a second for each, and alone where two exclude each other."""
    spans = [span for span in docs.spans(page) if ASSIGNMENTS.fullmatch(span)]
    each = [with_needed(span) for span in spans if "..." not in span and "<" not in span]
    for chunk in without_repeats(each):
        try:
            compose(tuple(word for words in chunk for word in words))
        except AssertionError:
            for words in chunk:
                compose(tuple(words))


def with_needed(span: str) -> list[str]:
    words = [word.rstrip(",") for word in re.findall(r"\S+?=(?:\{[^}]*\}|\S+)", span)]
    needed = [
        more
        for start, others in NEEDED.items()
        for more in others
        if any(word.startswith(start) for word in words)
    ]
    return ["pairs.root=/x", "evaluate.prompts.path=/x", *needed, *words]


def without_repeats(each: list[list[str]]) -> list[list[list[str]]]:
    """Chunks in which no setting has two values."""
    chunks: list[list[list[str]]] = []
    for words in each:
        for chunk in chunks:
            values = {word.partition("=")[0]: word for others in chunk for word in others}
            if all(values.get(word.partition("=")[0], word) == word for word in words):
                chunk.append(words)
                break
        else:
            chunks.append([words])
    return chunks


@of_page(PAGES)
def test_settings_named_in_sentences_exist(page: Path):
    for span in docs.spans(page):
        if SETTING.fullmatch(span) and span.rpartition(".")[2] not in FILE_ENDINGS:
            assert is_setting(span) or is_code(span), f"{page.name}: `{span}`"


def is_code(name: str) -> bool:
    """A module or a name in one; nothing is imported, because torch takes seconds."""
    module, _, attribute = name.rpartition(".")
    if is_module(name):
        return True
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path.is_file() and attribute in names_in(path)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {getattr(node, "name", "") for node in tree.body}


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


WRITTEN = re.compile(r"(train/(pipeline|lora|tensorboard|samples|step-.*)|evaluate/samples/)")
"""What a run writes, below its own folder."""
FOREIGN = re.compile(
    r"hpsv3/dataset/data_collator_qwen\.py|.*/(test_)?colourful\.(py|yaml)"
    r"|my_package/my_layout\.py"
)
"""Files of others, and of the metric and the layout that docs/metrics.md and pairs.md add."""


@of_page(PAGES)
def test_files_named_in_sentences_exist(page: Path):
    tops = "docs|conf|tests|benchmarks|examples|label|train|generate|evaluate|data"
    for span in docs.spans(page):
        named = re.sub(r"<\w+>", "*", span.partition("::")[0])
        if FOREIGN.fullmatch(named):
            continue
        if re.fullmatch(rf"(?:{tops})/[\w./*-]+", named) and not WRITTEN.match(named):
            assert list(ROOT.glob(named.rstrip("/"))), f"{page.name}: `{span}`"
        elif re.fullmatch(r"[\w/]+\.py", named):
            files = [path for top in tops.split("|") for path in code_files(top)]
            assert any(path.endswith(f"/{named}") for path in files), f"{page.name}: `{span}`"


@cache
def code_files(top: str) -> list[str]:
    return [str(path) for path in (ROOT / top).rglob("*.py")]


@of_page([page for page in PAGES if "docs" not in page.parts])
def test_links_lead_somewhere(page: Path):
    """Of pages outside docs/; test_docs_site builds the others strictly."""
    for link in docs.links(page):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            assert heading in docs.headings(target), f"{page.name}: {link}"
