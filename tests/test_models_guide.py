"""The published models' experiments: the paper's settings, their baselines, pinned weights."""

import re

import pytest

from tests.test_conf import job


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_experiments_have_the_published_settings_and_their_baseline(name: str):
    """Wallace et al. 2023: 2048 pairs a step, learning rate 1e-8 for each, beta 5000."""
    experiment = job(f"experiment={name}_pickapic", "pairs.root=/x")
    baseline = job(f"experiment={name}_pickapic", "pairs.root=/x", "vote=human", "reference=frozen")
    for train in (experiment.train, baseline.train):
        assert (train.steps, train.batch, train.beta) == (2000, 2048, 5000.0)
        assert train.lr == pytest.approx(1e-8 * train.batch)
        assert train.warmup == (200 if name == "sdxl" else 500)
        assert train.precision.value == "bf16"
    assert experiment.vote.name == "majority"
    assert experiment.train.reference.refresh.value == "snapshot"
    assert baseline.vote.name == "human"
    assert baseline.train.reference.refresh.value == "frozen"
    assert re.fullmatch("[0-9a-f]{40}", experiment.model.revision or "")
    assert experiment.panel.voters == ["hps", "clip", "pickscore", "aesthetic"]


@pytest.mark.parametrize(
    ("name", "side"), [("sd15", 512), ("sd21_512", 512), ("sd21", 768), ("sdxl", 1024)]
)
def test_models_are_pinned(name: str, side: int):
    model = job(f"model={name}").model
    assert model.resolution == side
    assert re.fullmatch("[0-9a-f]{40}", model.revision or "")
