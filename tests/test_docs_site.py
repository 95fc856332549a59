"""`make docs`: the site builds strictly, asks nothing of the network, and shows what GitHub shows.

Strict means that these are errors: a link or an anchor that leads nowhere, a page without a place
in the navigation, and an API page that names a module that is not there.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers_docs import ROOT, headings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


def test_pages_load_nothing_from_the_network(site: Path):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]*\b(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page.name


def test_api_pages_have_the_docstrings(site: Path):
    assert "Wallace et al. 2023, Eq. 14" in (site / "api" / "losses.html").read_text()
    assert "label_pairs" in (site / "api" / "votes.html").read_text()
    assert "sign_test" in (site / "search" / "search_index.json").read_text()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_a_page_renders_as_on_github(site: Path, page: Path):
    """Python-Markdown needs a blank line before a list, and four spaces inside one."""
    name = "index.html" if page.name == "README.md" else f"{page.stem}.html"
    html = (site / page.parent.relative_to(ROOT / "docs") / name).read_text()
    for paragraph in re.findall(r"<p>(.*?)</p>", html, re.DOTALL):
        text = paragraph.strip()
        assert not re.search(r"\n(- |\* |\d+\. |\|)", text), (
            f"a list or table in a line: {text[:80]}"
        )
        assert not re.match(r"(make|python|torchrun|srun) \w", text), f"no code block: {text[:80]}"
    anchors = set(re.findall(r"<h\d id=\"?([^\s\">]+)", html))
    assert headings(page) <= anchors | {""}
