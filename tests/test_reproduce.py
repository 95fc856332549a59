"""The comparison of arms: its arithmetic by hand, its processes, and a short run that is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from benchmarks.reproduce import children, page, report, tables
from benchmarks.reproduce.arms import ARMS, LOOSE_BETA, OURS, Group, named
from benchmarks.reproduce.plan import Plan, estimate, note_seconds
from benchmarks.reproduce.results import contrast
from data.artifacts.schemas import Role, sample_scores
from evaluate.statistics.winrate import Judge

ROOT = Path(__file__).parent.parent
JUDGES = (Judge("a", Role.VOTER), Judge("b", Role.VOTER), Judge("truth", Role.ORACLE))
PROMPTS = 40


def scores_of(**gains):
    """Model -> its scores: 1 on the first so many prompts, then -1, by judge; the base has 0."""
    names = [judge.metric for judge in JUDGES]
    frames = {}
    for model, wins in gains.items():
        facts = {"prompts_name": "p", "seed": 0, "model": model, "path": ""}
        rows = [
            facts
            | {"prompt_id": i, "prompt": str(i)}
            | {f"score_{n}": 1.0 if i < w else -1.0 for n, w in zip(names, wins, strict=True)}
            for i in range(PROMPTS)
        ]
        frames[model.replace("_", "-")] = pl.from_arrow(
            pa.Table.from_pylist(rows, schema=sample_scores(names))
        )
    base = next(iter(frames.values())).with_columns(
        model=pl.lit("base"), **{f"score_{n}": pl.lit(0.0, pl.Float32) for n in names}
    )
    return frames | {"base": base}


def against(scores, arm, other="base"):
    return contrast(scores, JUDGES, arm, other, resamples=500)


def test_training_seeds_are_pooled_and_shown_apart():
    """Voter a wins 30 and 20 of 40, b 40 and 10: rates .75 .5, 1 .25; average of all .625."""
    found = against(scores_of(x_0=(30, 40, 0), x_1=(20, 10, 40)), "x")
    assert [rate.win_rate.value for rate in found.comparison.rates] == [0.625, 0.625, 0.5]
    assert found.average.value == 0.625
    assert [seed["average"] for seed in found.by_seed] == [0.875, 0.375]
    low, high, deviation = found.spread()
    assert (low, high) == (0.375, 0.875)
    assert deviation == pytest.approx(np.std([0.375, 0.875], ddof=1))
    assert found.gain == pytest.approx((2 * 0.625 - 1) / 1.0)  # scores of 1 and -1 against zeros
    assert found.comparison.rates[0].prompts == PROMPTS
    assert found.comparison.rates[0].seeds == 2
    assert found.held == "is not shown"  # the second seed says the opposite


def test_arms_of_the_same_seed_are_compared():
    scores = scores_of(x_0=(40, 40, 40), x_1=(0, 0, 0), y_0=(0, 0, 0), y_1=(40, 40, 40))
    found = against(scores, "x", "y")
    assert [seed["a"] for seed in found.by_seed] == [1.0, 0.0]
    assert found.average.value == 0.5
    only = {name: frame for name, frame in scores.items() if name != "y-1"}
    assert [seed["a"] for seed in against(only, "x", "y").by_seed] == [1.0]
    with pytest.raises(ValueError, match="x and z have no training seed in common"):
        against(scores, "x", "z")


@pytest.mark.parametrize(
    ("wins", "held"), [((36, 38, 0), "holds"), ((2, 4, 40), "is contradicted")]
)
def test_a_claim_needs_the_interval_and_every_seed(wins, held):
    found = against(scores_of(x_0=wins, x_1=wins), "x")
    assert found.held == held
    assert found.weakest.metric == "a"
    assert found.verdicts == ((2, 1) if held == "holds" else (1, 2))


def test_prompts_and_not_images_are_resampled():
    """Three seeds that agree tell no more about other prompts than one."""
    one = against(scores_of(x_0=(24, 24, 24)), "x").average
    three = against(scores_of(x_0=(24,) * 3, x_1=(24,) * 3, x_2=(24,) * 3), "x").average
    assert one == three


def found_of(*arms):
    scores = scores_of(**{f"{arm}_{seed}": (30, 28, 26) for arm in arms for seed in (0, 1)})
    return {(arm, "base"): against(scores, arm) for arm in arms}


def test_tables_are_whole():
    found = found_of("majority", "human")
    alone = report.with_base(found)
    for text in (
        tables.against_base(alone, ARMS, JUDGES, {"human": 2646}),
        tables.steadiness(alone, ARMS),
        tables.claims({("majority", "human"): found["majority", "base"]}, ARMS),
    ):
        assert len({line.count("|") for line in text.splitlines()}) == 1
        assert len(text.splitlines()) >= 3
    first = tables.against_base(alone, ARMS, JUDGES, {"human": 2646}).splitlines()
    assert first[2].startswith("| human labels | 2646 | 72.5 (")  # arms in their order
    assert first[3].startswith("| majority, frozen reference | – | 72.5 (")
    flat = tables.rows(found.values())
    assert {(row["arm"], row["metric"]) for row in flat} == {
        (arm, metric) for arm in ("majority", "human") for metric in ("a", "b", "truth", "average")
    }


def test_figures_are_drawn_from_what_is_there(tmp_path):
    alone = report.with_base(found_of(OURS, "human", "majority"))
    from benchmarks.reproduce import figures

    figures.save(figures.win_rates(alone, ARMS), tmp_path / "a.svg")
    assert "majority, frozen reference" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert figures.snapshots(alone) is None  # fewer than three cadences


def test_the_page_keeps_what_stands_around_the_results(tmp_path):
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text("nothing here")
    with pytest.raises(ValueError, match="has no line"):
        page.publish(path, "new", [])
    path.write_text(f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter.\n")
    page.publish(path, "a \\1 table", [tmp_path / "docs" / "page" / "win-rates.svg"])
    text = path.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    assert "a \\1 table" in text
    assert "![win rates](page/win-rates.svg)" in text
    page.check_page(ROOT / "docs" / "reproduction.md")


# --- arms ----------------------------------------------------------------------------------------


def tiny_plan(folder, **changes):
    given = {"seeds": 2, "steps": 200, "prompts": 10, "pairs": 160, "arms": ARMS} | changes
    return Plan(folder=folder / "reproduce", **given)


@pytest.mark.slow
def test_every_arm_is_a_run_that_differs_in_one_thing(tmp_path):
    plan = tiny_plan(tmp_path)
    jobs = {unit.name: plan.train_job(unit) for unit in plan.units() if unit.arm and not unit.seed}
    assert len({job.folder for job in jobs.values()}) == len(ARMS)
    for job in jobs.values():
        same = (job.seed, job.train.steps, job.train.batch, job.train.lr)
        assert same == (0, 200, 32, 2e-5)
    for arm in ARMS:
        refresh = jobs[f"{arm.name}-0"].train.reference.refresh.value
        rule = jobs[f"{arm.name}-0"].vote.rule.value
        beta = jobs[f"{arm.name}-0"].train.beta
        assert (refresh == "frozen") == (arm.group is Group.LABELS or arm.name == "majority_loose")
        assert beta == (LOOSE_BETA if arm.name == "majority_loose" else 5000.0)
        if arm.group is not Group.LABELS:
            assert rule == "majority"
    cadences = {job.train.reference.every for name, job in jobs.items() if name.startswith(OURS)}
    assert len(cadences) >= 3
    coins = {plan.labels_job(named(["random"])[0], seed).vote.name for seed in range(2)}
    assert coins == {"random_0", "random_1"}


def test_claims_are_about_arms_that_there_are():
    known = {arm.name for arm in ARMS}
    for arm, others in tables.CLAIMS.values():
        assert {arm, *others} <= known
    with pytest.raises(ValueError, match="no arm majorty; there are human"):
        named(["majorty"])


def test_the_estimate_learns_from_what_was_measured(tmp_path):
    plan = tiny_plan(tmp_path, arms=named(["human", "sum"]))
    (plan.folder / "shared").mkdir(parents=True)
    before = estimate(plan, set(), jobs=1)
    note_seconds(plan, "human-0", 100.0)
    note_seconds(plan, "human-0", 5.0)  # a repetition that found it done
    after = estimate(plan, {"human-0", "base"}, jobs=2)
    assert after == pytest.approx(3 * 100 / 2)
    assert after != before


# --- processes -----------------------------------------------------------------------------------


def test_pieces_run_side_by_side_and_a_failure_stops_no_other(tmp_path):
    def piece(name, work):
        return children.Piece(name, tmp_path / name / "log.txt", work)

    def meet(own, other):
        (tmp_path / own).touch()
        deadline = time.monotonic() + 20
        while not (tmp_path / other).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        print(f"{own} met {other}")

    def fail():
        raise ValueError("as it should")

    pieces = [
        piece("1", lambda: meet("a", "b")),
        piece("2", fail),
        piece("3", lambda: meet("b", "a")),
    ]
    ends = {end.piece.name: end for end in children.run(pieces, jobs=2) if end}
    assert {name: end.failed for name, end in ends.items()} == {"1": False, "2": True, "3": False}
    assert "a met b" in (tmp_path / "1" / "log.txt").read_text()
    assert "ValueError: as it should" in (tmp_path / "2" / "log.txt").read_text()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def quick(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.reproduce", "--quick", "--folder", str(folder),
            "--jobs", "2", *more]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ranks
def test_a_killed_comparison_goes_on_and_then_has_nothing_left_to_do(tmp_path):
    folder, docs = tmp_path / "reproduce", tmp_path / "page.md"
    first = subprocess.Popen(
        quick(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (folder / "judge/evaluate/scores/base.parquet").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = children_of(first.pid)
    assert workers
    first.kill()  # the parent alone: nobody may go on behind its back
    first.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (folder / "results").exists()
    base = (folder / "judge/evaluate/scores/base.parquet").stat().st_mtime_ns
    docs.write_text(f"{page.BEGIN}\n{page.END}\n")
    done = subprocess.run(quick(folder, "--docs", str(docs)), cwd=ROOT, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "judge/evaluate/scores/base.parquet").stat().st_mtime_ns == base
    made = json.loads((folder / "results" / "results.json").read_text())
    assert {(row["arm"], row["against"]) for row in made["results"]} == {
        ("random", "base"), ("balanced", "base"),
    }  # fmt: skip
    assert {row["metric"] for row in made["results"]} == {
        "hps", "clip", "pickscore", "aesthetic", "held_out", "oracle", "average",
    }  # fmt: skip
    assert "| BalancedDPO |" in docs.read_text()
    assert (folder / "balanced-0" / "train" / "pipeline" / "model_index.json").is_file()
    assert not list(folder.glob("*/train/step-*"))
    assert "BalancedDPO" in done.stdout
