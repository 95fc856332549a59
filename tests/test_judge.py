import numpy as np
import polars as pl
import pytest

from data.artifacts import schemas
from data.artifacts.atomic import write_bytes
from data.images import encode_png
from evaluate.judging import scores as judging
from evaluate.judging.scores import Scorers, is_judged, judge, write_scores
from generate.config import PromptsSpec
from generate.image_files import SamplesError, list_samples
from generate.prompts.prompt_set import load_prompts
from tests.helpers_evaluate import FakePanel


@pytest.fixture
def images(tmp_path):
    """Images of two models for five prompts and two seeds, each of one colour."""
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\nd\ne\n")
    prompts = load_prompts(PromptsSpec(name="set", path=str(path)))
    rng = np.random.default_rng(0)
    samples = [
        sample
        for name in ("base", "new")
        for sample in list_samples(tmp_path / "samples", name, prompts, [0, 1])
    ]
    for sample in samples:
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        write_bytes(sample.path, encode_png(np.tile(colour, (8, 8, 1))))
    return samples


def run(images, panel=None):
    counts = []
    scores = judge(images, panel or FakePanel(), batch=4, workers=0, advance=counts.append)
    assert sum(counts) == len(images)
    return scores


def test_the_panel_follows_the_protocol():
    from label.scoring.panel import Panel

    assert isinstance(FakePanel(), Scorers)
    assert isinstance(Panel({}), Scorers)


def test_every_image_gets_its_own_score(images):
    scores = run(images)
    for row, image in enumerate(images):
        expected = FakePanel._row(image.path.read_bytes())
        assert [scores[name][row] for name in FakePanel.names] == pytest.approx(expected)


def test_images_of_a_prompt_are_scored_together_in_bounded_parts(images, monkeypatch):
    whole = run(images)
    monkeypatch.setattr(judging, "CHUNK", 4)
    panel, seen = FakePanel(), []
    score = panel.score
    panel.score = lambda images, prompts, **more: seen.append(prompts) or score(images, prompts)
    parts = run(images, panel)
    assert [set(texts) for texts in seen] == [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]
    for name in FakePanel.names:
        assert np.array_equal(parts[name], whole[name])


def test_a_damaged_image_is_refused_by_name(images):
    images[3].path.write_bytes(b"torn")
    with pytest.raises(SamplesError, match=f"{images[3].path} is no image any more"):
        run(images)


def test_scores_file(images, tmp_path):
    scores = run(images)
    scores["red"][3] = np.nan
    path, settings = (
        tmp_path / "scores.parquet",
        {"seeds": [0, 1], "metrics": {"red": {"tie": 0.0}}},
    )
    assert not is_judged(path, settings)
    write_scores(path, images, scores, folder=tmp_path, prompts_name="set", settings=settings)
    frame = pl.read_parquet(path)
    assert frame.columns == schemas.sample_scores(FakePanel.names).names
    assert frame["score_red"].null_count() == 1  # null, not NaN
    assert frame["score_red"].is_nan().sum() == 0
    assert frame.row(3, named=True)["score_red"] is None
    assert frame["path"][0] == "samples/base/00000-0.png"
    assert (tmp_path / frame["path"][19]) == images[19].path
    assert frame["seed"].to_list() == [0, 1] * 10
    assert is_judged(path, settings)
    assert not is_judged(path, settings | {"seeds": [0]})
