"""Names and words that this code does without, and what to write in their place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VAGUE = {"found", "asked", "told", "made", "held"}
"""Participles that say what happened to a thing; a name says what it is: scores, rows, missing."""
FOLDERS = ("data", "label", "train", "generate", "evaluate", "conf", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted(
    {
        *SOURCES,
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
        *(ROOT / "conf").rglob("*.yaml"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.j2")),
        ROOT / "Makefile",
    }
    - {Path(__file__)}
)
QUOTES = {
    "CONTRIBUTING.md": "first, second, picture",
    "tests/helpers_golden.py": "How well does the picture show this?",
    **dict.fromkeys(
        ("data/images.py", "docs/pairs.md", "tests/test_images.py"), "not a picture of"
    ),
}
"""File -> words that stay: golden scores and label files have them, or the page warns of them."""
FORMER_SETTINGS = re.compile(r"\b(label|evaluate|parity)\.pictures\b")
"""Settings that are answered with their new names."""


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that gets a name: variables, attributes, arguments, functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.MatchMapping(rest=str(name)):
                yield node.lineno, name


def vague_names(source: str) -> list[str]:
    """`line: name` of each vague name that this code binds."""
    names = sorted(set(bound_names(ast.parse(source))))
    return [f"{line}: {name}" for line, name in names if name in VAGUE]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_what_a_thing_is(path: Path):
    names = vague_names(path.read_text())
    assert not names, f"name the thing in {relative(path)}: {', '.join(names)}"


@pytest.mark.parametrize(
    "source",
    [
        "found = 1", "found: int = 1", "found += 1", "a, (found, b) = c", "for found in a: pass",
        "with a as found: pass", "[found for found in a]", "if (found := 1): pass",
        "def found(): pass", "async def found(): pass", "def f(found): pass",
        "def f(*, found=1): pass", "def f(*found): pass", "lambda found: 1", "class found: pass",
        "import a as found", "from a import b as found", "self.found = 1",
        "try:\n    pass\nexcept E as found:\n    pass",
        "match a:\n    case [found, *_]:\n        pass",
        "match a:\n    case {**found}:\n        pass",
        "match a:\n    case [1, *found]:\n        pass",
    ],
)  # fmt: skip
def test_a_vague_name_is_noticed(source: str):
    assert [name.split(": ")[1] for name in vague_names(source)] == ["found"]


def test_other_names_and_words_pass():
    assert vague_names("founded = found; print('found', a.held, f(made=1))") == []


def test_an_image_is_called_an_image():
    for path in TEXTS:
        text = path.read_text().replace(QUOTES.get(relative(path), "\0"), "")
        text = FORMER_SETTINGS.sub("", text).lower()
        assert "picture" not in text, f"write image, not picture, in {relative(path)}"
