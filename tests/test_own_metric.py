"""docs/metrics.md, "Adding a metric", done as it says in a copy of the program."""

import re
import shlex
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers_docs import ROOT, blocks, shell_lines, started

PAGE = ROOT / "docs" / "metrics.md"
WEIGHTS = Path("data/miniature/weights")

pytestmark = pytest.mark.slow


def apply(diff: str, folder: Path) -> None:
    """Make each change; what is replaced must be there exactly once."""
    for name, change in re.findall(r"^--- (\S+)\n((?:[ +-].*\n)+?)(?=--- |\Z)", diff, re.MULTILINE):
        lines = change.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in sign) for sign in
                         (" -", " +"))  # fmt: skip
        source = (folder / name).read_text()
        assert source.count(before) == 1, f"{name} has no {before!r}"
        (folder / name).write_text(source.replace(before, after))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the metric of the page."""
    folder = tmp_path_factory.mktemp("program")
    for package in ("data", "label", "train", "evaluate", "conf"):
        leave_out = shutil.ignore_patterns("__pycache__", "weights", "3000")
        shutil.copytree(ROOT / package, folder / package, ignore=leave_out)
    (folder / WEIGHTS).symlink_to(ROOT / WEIGHTS)
    text = PAGE.read_text()
    names = re.findall(r"^\*\*\d\. .*?`([\w/]+\.(?:py|yaml))`", text, re.MULTILINE)
    metric, test = blocks(PAGE, "python")
    (settings,) = blocks(PAGE, "yaml")
    assert names == [
        "label/metrics/colourful.py", "conf/metric/colourful.yaml", "tests/test_colourful.py"
    ]  # fmt: skip
    (folder / "tests").mkdir()
    for name, content in zip(names, (metric, settings, test), strict=True):
        (folder / name).write_text(content)
    (diff,) = blocks(PAGE, "diff")
    apply(diff, folder)
    return folder


def python(copy: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=300,
        check=False, env={"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_test_passes(copy: Path):
    python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_colourful.py")


def test_it_scores_and_votes(copy: Path):
    (command,) = [line for line in shell_lines(PAGE) if "colourful" in line]
    assert shlex.split(command)[:2] == ["make", "labels"]
    ((module, *overrides),) = started(command)
    assert module == "label"
    small = [f"pairs.root={copy}/pairs", "pairs.options.num_pairs=40", "label.workers=0"]
    python(copy, "-m", "label", *overrides, *small, "label.device=cpu")
    labelled = pl.read_parquet(copy / "runs/miniature/labels/colour/part-*.parquet")
    files = sorted((copy / "pairs").glob("train-*.parquet"))
    images = pl.concat([pl.from_arrow(pq.read_table(file, columns=["jpg_0"])) for file in files])
    scored = labelled["status"] == "ok"
    assert scored.sum() >= 30
    expected = [colourfulness(content) for content in images["jpg_0"].filter(scored)]
    np.testing.assert_allclose(labelled["score_colour_0"].filter(scored), expected, rtol=1e-5)
    votes = labelled.filter(scored).select(
        pl.sum_horizontal("vote_hps", "vote_clip", "vote_colour")
    )
    assert (votes.to_series().abs() == labelled.filter(scored)["margin"]).all()


def colourfulness(content: bytes) -> float:
    """The paper's formula from the two channels' covariance matrix."""
    pixels = np.asarray(Image.open(BytesIO(content)).convert("RGB"), np.float64).reshape(-1, 3)
    opponent = pixels @ np.array([[1, -1, 0], [0.5, 0.5, -1]]).T
    spread = np.trace(np.cov(opponent.T, bias=True))
    return float(np.sqrt(spread) + 0.3 * np.linalg.norm(opponent.mean(0)))
