"""Every command in the models' guide and in the experiments' headers composes."""

import re
from pathlib import Path

import pytest

from tests.test_conf import CONF, ROOT, job

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGES = [ROOT / "docs/models.md", *sorted((CONF / "experiment").glob("*_pickapic.yaml"))]


def commands(page: Path) -> list[list[str]]:
    """The overrides of each `make` line, as the Makefile hands them on."""
    text = re.sub(r"\n# +", " ", page.read_text())
    found = []
    for line in re.finditer(r"make (?:labels|train|eval)((?: [A-Z]+=(?:\"[^\"]*\"|\S+))+)", text):
        values = dict(re.findall(r" (ARGS)=\"([^\"]*)\"", line.group(1)))
        named = dict(re.findall(r" (EXP|RUN|VOTE)=(\w+)", line.group(1)))
        more = values.get("ARGS", "").replace("=...", f"={COMMIT}").split()
        groups = {"EXP": "experiment", "RUN": "run", "VOTE": "vote"}
        found.append([f"{groups[key]}={value}" for key, value in named.items()] + more)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_compose(page: Path):
    found = commands(page)
    assert found or page.name != "models.md"
    for overrides in found:
        made = job(*overrides)
        assert made.run
        for name, path in made.evaluate.models.items():
            assert path, name


def test_the_guide_has_its_commands():
    assert len(commands(PAGES[0])) >= 3
    lora = next(line for line in commands(PAGES[0]) if "tuning=lora" in line)
    assert job(*lora).train.lora.rank == 16


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_experiments_have_the_published_settings_and_their_baseline(name: str):
    """Wallace et al. 2023: 2048 pairs a step, learning rate 1e-8 for each, beta 5000."""
    made = job(f"experiment={name}_pickapic", "pairs.root=/x")
    baseline = job(f"experiment={name}_pickapic", "pairs.root=/x", "vote=human", "reference=frozen")
    for train in (made.train, baseline.train):
        assert (train.steps, train.batch, train.beta) == (2000, 2048, 5000.0)
        assert train.lr == pytest.approx(1e-8 * train.batch)
        assert train.warmup == (200 if name == "sdxl" else 500)
        assert train.precision.value == "bf16"
    assert made.vote.name == "majority"
    assert made.train.reference.refresh.value == "snapshot"
    assert baseline.vote.name == "human"
    assert baseline.train.reference.refresh.value == "frozen"
    assert re.fullmatch("[0-9a-f]{40}", made.model.revision or "")
    assert made.panel.voters == ["hps", "clip", "pickscore", "aesthetic"]


@pytest.mark.parametrize(
    ("name", "side"), [("sd15", 512), ("sd21_512", 512), ("sd21", 768), ("sdxl", 1024)]
)
def test_models_are_pinned(name: str, side: int):
    made = job(f"model={name}").model
    assert made.resolution == side
    assert re.fullmatch("[0-9a-f]{40}", made.revision or "")
