"""docs/api.md: its signatures are the code's, its examples print what it says."""

import ast
import doctest
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers_docs import ROOT, blocks
from tests.helpers_train import write_labels, write_pairs

PAGE = ROOT / "docs" / "api.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]


def signature(node: ast.stmt) -> str:
    """A function's first line, or a class's fields and public methods, without their bodies."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}: ..."
    assert isinstance(node, ast.ClassDef)
    parts = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    named = [part for part in methods if not part.name.startswith("_") and not part.decorator_list]
    lines = [*parts, *map(signature, named)]
    return "\n".join([f"class {node.name}:", *(f"    {line}" for line in lines)])


def stubs() -> Iterator[tuple[str, ast.stmt]]:
    """Module and stub of everything on the page."""
    for block in blocks(PAGE, "python"):
        for module, code in re.findall(r"^# ([\w.]+)\n(.*?)(?=^# |\Z)", block, re.DOTALL | re.M):
            yield from ((module, node) for node in ast.parse(code).body)


@pytest.mark.parametrize(
    ("module", "node"), list(stubs()), ids=lambda value: getattr(value, "name", value)
)
def test_a_signature_is_the_codes(module: str, node: ast.stmt):
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    found = [item for item in tree.body if getattr(item, "name", "") == node.name]
    assert [signature(item) for item in found] == [signature(node)]


def test_everything_has_a_signature_a_line_and_an_example():
    assert len(SECTIONS) >= 8
    for section in SECTIONS:
        title, _, body = section.partition("\n")
        assert "```pycon" in body, title
        heads = set(re.findall(r"^# ([\w.]+)$", body, re.MULTILINE))
        assert heads == set(re.findall(r"`([\w.]+)`", title))
    first = [row.split("|")[1] for row in PAGE.read_text().splitlines() if row.startswith("| `")]
    told = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(node.name for _, node in stubs())


def test_the_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other, in a folder with the run and the pairs that the page speaks of."""
    pairs = write_pairs(tmp_path / "data" / "miniature" / "pairs" / "3000")
    write_labels(tmp_path / "runs" / "miniature" / "labels" / "majority", pairs)
    monkeypatch.chdir(tmp_path)
    runner, known = doctest.DocTestRunner(verbose=False), {}
    for number, code in enumerate(blocks(PAGE, "pycon")):
        example = doctest.DocTestParser().get_doctest(code, known, f"block {number}", None, 0)
        assert len(example.examples) >= 4
        runner.run(example, clear_globs=False)
        known = example.globs
    assert runner.failures == 0
