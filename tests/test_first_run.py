"""What a new user may mistype, and what is answered: found, allowed, what to change."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.job import composed, explain
from data.pairs.miniature import ensure_pairs
from tests.helpers_docs import dry_run
from tests.helpers_ranks import shared_place


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evla"], ["unknown target evla", "allowed: help setup pairs labels train"]),
        (["eval", "exp=sdxl_pickapic"], ["unknown variable exp", "allowed: EXP RUN"]),
        (["labels", "ARG=vote=human"], ["unknown variable ARG"]),
        (["eval", "reference=frozen"], ["unknown variable reference", 'ARGS="train.steps=400 ref']),
    ],
)
def test_make_answers_what_it_does_not_know(words: list[str], says: list[str]):
    done = dry_run(*words)
    answer = done.stdout + done.stderr
    assert done.returncode != 0
    for part in says:
        assert part in answer
    assert "-m label" not in answer


def test_make_takes_every_variable_of_its_help():
    done = dry_run("eval", "EXP=miniature", "RUN=a", "VOTE=human", "GATE=1", "NPROC=1", "ARGS=a=b")
    assert done.returncode == 0, done.stderr


@pytest.mark.ranks
def test_the_default_run_fits_any_machine():
    """`make eval` starts a process a GPU, and the miniature's micro-batch is its batch."""
    assert composed([]).train.micro_batch == composed([]).train.batch
    place = shared_place()
    said = place.train("gpus", "train.steps=1", "train.micro_batch=8", "train.reference.every=1",
                       world=2)  # fmt: skip
    assert "trained 1 steps of 8 pairs" in said
    assert place.journal("gpus")[0]["loss"] == pytest.approx(math.log(2))
    refused = place.fail("odd-gpus", "train.batch=9", "train.micro_batch=9", world=2)
    assert "train.batch=9 is no multiple of train.micro_batch=9 x 2 processes" in refused


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.lr"], ["'train.lr' cannot be read", "missing EQUAL", "write name=value"]),
        (["panel.voters=[clip,hps"], ["'panel.voters=[clip,hps'", "quote what has spaces"]),
        (["zero=2"], ["Got int", "zero=stage3"]),
        (["+foo=1"], ["nothing reads the setting 'foo'", "without the +"]),
        (["+train.stps=1"], ["nothing reads the setting 'stps'"]),
        (["metrics.clap.tie=1"], ["unknown setting metrics.clap", "did you mean metrics.clip?"]),
        (["evaluate.models.ours=/x"], ["a + in front: +evaluate.models.ours="]),
        (["pairs=parquet", "pairs.root=/x", "pairs.columns.promt=text"],
         ["did you mean pairs.columns.prompt?", "pairs.columns.human"]),
        (["train.reference.evry=3"], ["did you mean train.reference.every?"]),
        (["experiment=sd15_pickapic"],
         ["pairs.root is not set and has no default", 'ARGS="pairs.root=..."']),
        (["model=sd1.5"], ["unknown model 'sd1.5'", "did you mean sd15?", "sdxl"]),
        (["train.steps=1e3"], ["train.steps", "1000.0", "Integer"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_settings(overrides: list[str], says: list[str]):
    with pytest.raises(Exception) as refusal:  # noqa: B017, PT011 - Hydra's, OmegaConf's or ours
        composed(overrides)
    answer = explain(refusal.value)
    for words in says:
        assert words in answer
    assert "hydra.cc" not in answer


def test_the_miniature_is_never_drawn_among_ones_own_files(tmp_path: Path):
    """Who names `pairs.root` and forgets `pairs=` must lose nothing, and be told."""
    mine = pa.table({"caption": ["a"], "model_0": ["somebody"]})
    for name in ("mine.parquet", "train-00000-of-00004.parquet", "notes.txt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        pq.write_table(mine, folder / name)
        before = (folder / name).read_bytes()
        with pytest.raises(ValueError, match=rf"{name}, which is not of the min.*pairs=pickapic"):
            ensure_pairs(folder, 8)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_bytes() == before


def test_a_folder_that_is_not_there_gets_the_miniature_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A mistyped pairs.root without pairs= must not look like one's own pairs."""
    for _ in range(2):
        ensure_pairs(tmp_path / "typo", 20)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # once for each split, and not again
    assert f"drawing 20 train pairs into {tmp_path / 'typo'}" in said[0]
    assert "pairs=pickapic" in said[0]
