"""Every arrow, from image pairs to the report, on the miniature world with its own weights."""

import json
from pathlib import Path

import polars as pl
import pytest

from data.artifacts import schemas
from data.artifacts.manifest import read_manifest, verify
from tests.helpers_docs import PAGES, blocks
from tests.helpers_ranks import run_module

VOTERS = ["hps", "clip", "pickscore", "aesthetic"]

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def run_stage(stage: str, folder: Path, *overrides: str) -> str:
    """One stage as the Makefile starts it, small; what it printed."""
    done = run_module(
        folder / "logs", stage, f"runs={folder}", "run=small",
        f"pairs.root={folder}/pairs", "pairs.options.num_pairs=160",
        "train.steps=4", "train.batch=8", "train.micro_batch=4", "train.reference.every=2",
        "train.checkpoint_every=2", "train.warmup=1",
        "evaluate.prompts.max_prompts=6", "evaluate.steps=2", "evaluate.resamples=200",
        *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("label", "train", "evaluate"):
        (folder / f"{stage}.txt").write_text(run_stage(stage, folder))
    return folder / "small"


def test_labels_are_complete_and_add_up(run: Path):
    labels = pl.read_parquet(run / "labels" / "majority" / "part-*.parquet")
    assert labels.height == 160
    assert labels.columns == schemas.labels(VOTERS).names
    assert labels["pair_id"].n_unique() == 160
    manifest = read_manifest(run / "labels" / "majority", "labels")
    assert manifest is not None
    assert manifest.rows == 160
    verify(run / "labels" / "majority", manifest)
    assert set(labels["status"]) >= {"ok", "unreadable_image", "empty_prompt"}
    bad = labels.filter(pl.col("status") != "ok")
    assert bad["winner"].is_null().all()
    assert (bad["reason"] != "").all()


def test_the_winner_has_more_votes(run: Path):
    labels = pl.read_parquet(run / "labels" / "majority" / "part-*.parquet")
    votes = labels.filter(pl.col("status") == "ok").select(
        "winner",
        "votes_0",
        "votes_1",
        "margin",
        total=pl.sum_horizontal(f"vote_{v}" for v in VOTERS),
    )
    assert (votes["total"] == votes["votes_0"] - votes["votes_1"]).all()
    assert (votes["margin"] == votes["total"].abs()).all()
    expected = votes["total"].sign().replace_strict({1: 0, -1: 1, 0: None}, return_dtype=pl.Int8)
    assert expected.equals(votes["winner"].rename("total"), null_equal=True)


def test_the_journal_begins_at_ln_2_and_is_there_again_after_a_snapshot(run: Path):
    lines = [
        json.loads(line) for line in (run / "train" / "journal.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    ln_2 = 0.6931471805599453
    assert lines[0]["loss"] == pytest.approx(ln_2, abs=1e-7)
    assert lines[1]["loss"] != pytest.approx(ln_2, abs=1e-7)
    assert lines[2]["loss"] == pytest.approx(ln_2, abs=1e-7)  # the reference was renewed after 2
    assert [line["reference_version"] for line in lines] == [0, 0, 1, 1]


def test_win_rates_cover_voters_and_oracle(run: Path):
    rates = pl.read_parquet(run / "evaluate" / "winrates.parquet")
    assert rates.columns == schemas.WIN_RATES.names
    roles = dict(rates.select("metric", "role").iter_rows())
    assert roles == dict.fromkeys(VOTERS, "voter") | {
        "held_out": "held_out",
        "oracle": "oracle",
    }
    assert (rates["wins"] + rates["ties"] + rates["losses"] == 6).all()
    assert (rates["ci_low"] <= rates["win_rate"]).all()
    assert (rates["win_rate"] <= rates["ci_high"]).all()


def test_the_report_stands_alone(run: Path):
    page = (run / "evaluate" / "report.html").read_text()
    assert "<img" in page
    for outside in ('src="http', "src='http", '<link rel="stylesheet" href="http', "<script src"):
        assert outside not in page


def test_a_second_run_finds_all_done(run: Path):
    files = [path for path in run.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    for stage in ("label", "train", "evaluate"):
        assert run_stage(stage, run.parent)
    assert {path: path.stat().st_mtime_ns for path in files} == before


RUN_ELSEWHERE = {
    "labels.md": "test_docs_labels",
    "metrics.md": "test_own_metric",
}
"""Pages whose Python is run by a test of their own."""
NOT_RUN = {
    'from_pretrained("/models/sd15")': "test_lora loads such a folder onto a small base",
    'from_pretrained("/models/sd3"': "test_flow_pipelines loads such a folder",
    "pipeline.fuse_lora": "goes on from the one before",
    "reshape(4, 64, 64)": "test_latents reads blobs so; the miniature's have another shape",
    "reshape(77, 768)": "test_texts reads such a set; this run has none",
}
"""Parts of code on the pages that is compiled and not run, and why."""
CODE = [
    (page, code)
    for page in PAGES
    if page.name not in RUN_ELSEWHERE
    for code in blocks(page, "python")
]


@pytest.mark.parametrize(("page", "code"), CODE, ids=lambda value: getattr(value, "stem", "code"))
def test_the_pages_python_runs(
    page: Path, code: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    compiled = compile(code.replace("runs/miniature", str(run)), str(page), "exec")
    if any(part in code for part in NOT_RUN):
        return
    exec(compiled, {})
    output = capsys.readouterr().out
    assert output or "print(" not in code
    if "decided_by" in code:  # the README's look at the labels
        for word in ("majority", "vote_clip", "unreadable_image", "the prompt is empty"):
            assert word in output


def test_what_is_not_run_is_on_a_page():
    assert all(any(part in code for _, code in CODE) for part in NOT_RUN)


def test_another_run_may_share_the_scores(run: Path):
    """docs/README.md: links to the folders of another run, and nothing is scored again."""
    other = run.parent / "other"
    other.mkdir()
    (other / "scores").symlink_to("../small/scores")
    output = run_stage("label", run.parent, "run=other", "vote=human")
    assert "pairs on cpu" in (run.parent / "label.txt").read_text()
    assert "pairs on cpu" not in output
    assert read_manifest(other / "labels" / "human", "labels") is not None


def test_the_trained_pipeline_is_a_diffusers_folder(run: Path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(run / "train" / "pipeline")
    image = pipeline("a small red circle at the left on a blue background", num_inference_steps=2)
    assert image.images[0].size == (64, 64)
