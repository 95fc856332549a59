"""The comparison of arms: its arithmetic by hand, its processes, and a short killed run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from benchmarks.reproduce import best, children, own, own_beta, page, paper, report, tables
from benchmarks.reproduce.paper import ARMS, LOOSE_BETA, OURS, Group
from benchmarks.reproduce.plan import Plan, Unit, estimate, note_seconds
from benchmarks.reproduce.results import contrast
from data.artifacts.schemas import Role, sample_scores
from evaluate.statistics.winrate import Judge
from tests.helpers_ranks import be_module, run_ranks, start_ranks

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
    contrast = against(scores_of(x_0=(30, 40, 0), x_1=(20, 10, 40)), "x")
    assert [rate.win_rate.value for rate in contrast.comparison.rates] == [0.625, 0.625, 0.5]
    assert contrast.average.value == 0.625
    assert [seed["average"] for seed in contrast.by_seed] == [0.875, 0.375]
    low, high, deviation = contrast.spread()
    assert (low, high) == (0.375, 0.875)
    assert deviation == pytest.approx(np.std([0.375, 0.875], ddof=1))
    assert contrast.gain == pytest.approx((2 * 0.625 - 1) / 1.0)  # scores of 1 and -1 against zeros
    assert contrast.comparison.rates[0].prompts == PROMPTS
    assert contrast.comparison.rates[0].seeds == 2
    assert contrast.conclusion == "is not shown"  # the second seed says the opposite


def test_arms_of_the_same_seed_are_compared():
    scores = scores_of(x_0=(40, 40, 40), x_1=(0, 0, 0), y_0=(0, 0, 0), y_1=(40, 40, 40))
    contrast = against(scores, "x", "y")
    assert [seed["a"] for seed in contrast.by_seed] == [1.0, 0.0]
    assert contrast.average.value == 0.5
    only = {name: frame for name, frame in scores.items() if name != "y-1"}
    assert [seed["a"] for seed in against(only, "x", "y").by_seed] == [1.0]
    with pytest.raises(ValueError, match="x and z have no training seed in common"):
        against(scores, "x", "z")


@pytest.mark.parametrize(
    ("wins", "conclusion"), [((36, 38, 0), "holds"), ((2, 4, 40), "is contradicted")]
)
def test_a_claim_needs_the_interval_and_every_seed(wins, conclusion):
    contrast = against(scores_of(x_0=wins, x_1=wins), "x")
    assert contrast.conclusion == conclusion
    assert contrast.weakest.metric == "a"
    assert contrast.verdicts == ((2, 1) if conclusion == "holds" else (1, 2))


def test_prompts_and_not_images_are_resampled():
    """Three seeds that agree tell no more about other prompts than one."""
    one = against(scores_of(x_0=(24, 24, 24)), "x").average
    three = against(scores_of(x_0=(24,) * 3, x_1=(24,) * 3, x_2=(24,) * 3), "x").average
    assert one == three


def contrasts_of(*arms):
    scores = scores_of(**{f"{arm}_{seed}": (30, 28, 26) for arm in arms for seed in (0, 1)})
    return {(arm, "base"): against(scores, arm) for arm in arms}


def test_tables_are_whole():
    contrasts = contrasts_of("majority", "human")
    alone = report.with_base(contrasts)
    for text in (
        tables.against_base(alone, ARMS, JUDGES, {"human": 2646}),
        tables.steadiness(alone, ARMS),
        tables.claims({("majority", "human"): contrasts["majority", "base"]}, paper.STUDY),
    ):
        assert len({line.count("|") for line in text.splitlines()}) == 1
        assert len(text.splitlines()) >= 3
    first = tables.against_base(alone, ARMS, JUDGES, {"human": 2646}).splitlines()
    assert first[2].startswith("| human labels | 2646 | 72.5 (")  # arms in their order
    assert first[3].startswith("| majority, frozen reference | – | 72.5 (")
    flat = tables.rows(contrasts.values())
    assert {(row["arm"], row["metric"]) for row in flat} == {
        (arm, metric) for arm in ("majority", "human") for metric in ("a", "b", "truth", "average")
    }


def test_figures_show_the_finished_arms(tmp_path):
    alone = report.with_base(contrasts_of(OURS, "human", "majority"))
    from benchmarks.reproduce import figures

    figures.save(figures.win_rates(alone, ARMS), tmp_path / "a.svg")
    assert "majority, frozen reference" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert figures.snapshots(alone) is None  # fewer than three cadences


def test_the_page_keeps_the_text_around_the_results(tmp_path):
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text("nothing here")
    with pytest.raises(ValueError, match="has no line"):
        page.publish(path, "results", "new", [])
    (begin, end), other = page.marks("results"), "\n".join(page.marks("own pairs"))
    path.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nAfter.\n{other}\n")
    page.publish(path, "results", "a \\1 table", [tmp_path / "docs" / "page" / "win-rates.svg"])
    text = path.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith(f"\n\nAfter.\n{other}\n")
    assert "old" not in text
    assert "a \\1 table" in text
    assert "![win rates](page/win-rates.svg)" in text
    for study in (paper.STUDY, own.STUDY, own_beta.STUDY, best.STUDY):
        page.check_page(ROOT / study.page, study.mark)


# --- arms ----------------------------------------------------------------------------------------


def tiny_plan(folder, **changes):
    settings = {"seeds": 2, "steps": 200, "prompts": 10, "pairs": 160} | changes
    study = settings.setdefault("study", paper.STUDY)
    return Plan(folder=folder / "reproduce", **{"arms": study.arms} | settings)


@pytest.mark.slow
def test_every_arm_is_a_run_that_differs_in_one_thing(tmp_path):
    plan = tiny_plan(tmp_path)
    jobs = {unit.name: plan.unit_job(unit) for unit in plan.units() if unit.arm and not unit.seed}
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
    (random,) = paper.STUDY.named(["random"])
    coins = {plan.pairs_job(paper.SHARED, random, seed).vote.name for seed in range(2)}
    assert coins == {"random_0", "random_1"}


@pytest.mark.slow
def test_own_pairs_are_as_many_and_rounds_continue_one_another(tmp_path):
    """The same pairs, prompts and steps on both sides of what is compared."""
    plan = tiny_plan(tmp_path, study=own.STUDY, pairs=30, steps=200)
    jobs = {arm.name: plan.unit_job(Unit(arm, 1)) for arm in plan.arms}
    assert jobs["given"].pairs.kind == "miniature"
    assert jobs["given"].pairs.options == {"num_pairs": 30}
    roots = {name: job.pairs.root.removeprefix(f"{plan.folder}/") for name, job in jobs.items()}
    assert roots == dict.fromkeys(jobs, "first/pairs") | {
        "given": "data/miniature/pairs/30", "long": "whole/pairs",
        "round_2": "round_2-1/pairs", "round_3": "round_3-1/pairs",
    }  # fmt: skip
    steps = {name: job.train.steps for name, job in jobs.items()}
    assert steps == dict.fromkeys(jobs, 200) | {"long": 600}
    policies = {name: job.model.path.removeprefix(f"{plan.folder}/") for name, job in jobs.items()}
    base = plan.judge_job().model.path
    assert policies == dict.fromkeys(jobs, base) | {
        "round_2": "own-1/train/pipeline", "round_3": "round_2-1/train/pipeline",
    }  # fmt: skip
    votes = {name: (job.vote.rule.value, job.vote.select.value) for name, job in jobs.items()}
    assert votes == dict.fromkeys(jobs, ("majority", "all")) | {
        "unanimous": ("unanimous", "all"), "extremes": ("majority", "extremes"),
    }  # fmt: skip
    assert {(job.train.reference.every, job.seed) for job in jobs.values()} == {(50, 1)}
    prompts = {
        name: (job.generate.prompts.skip_prompts, job.generate.prompts.max_prompts)
        for name, job in jobs.items()
        if name != "given"
    }
    assert prompts == dict.fromkeys(prompts, (0, 10)) | {
        "round_2": (10, 10), "round_3": (20, 10), "long": (0, 30),
    }  # fmt: skip


def test_pieces_wait_for_what_they_need(tmp_path):
    from benchmarks.reproduce import work

    plan = tiny_plan(tmp_path, study=own.STUDY, pairs=30)
    needs = {piece.name: piece.needs for piece in work.pieces(plan)}
    assert len(needs) == 3 + 1 + 2 * len(plan.arms)
    assert needs["base"] == needs["given"] == needs["first"] == needs["whole"] == set()
    assert needs["own-1"] == needs["extremes-1"] == {"first"}
    assert (needs["round_2-1"], needs["round_3-1"]) == ({"own-1"}, {"round_2-1"})
    assert estimate(plan, {"long-0"}, jobs=2) < estimate(plan, {"own-0"}, jobs=2)


def test_claims_are_about_known_arms():
    for study in (paper.STUDY, own.STUDY):
        known = {arm.name for arm in study.arms}
        for arm, others in study.claims.values():
            assert {arm, *others} <= known
        assert study.steady <= known
        assert set(study.quick_arms) <= known
    with pytest.raises(ValueError, match="unknown arm majorty; the arms are human"):
        paper.STUDY.named(["majorty"])
    with pytest.raises(ValueError, match="arm round_2 continues own; name that arm as well"):
        own.STUDY.named(["round_2"])


@pytest.mark.parametrize("pairs", [0, 31, 30_000])
def test_a_number_of_pairs_that_cannot_be_generated_is_refused(tmp_path, pairs):
    with pytest.raises(ValueError, match=rf"--pairs {pairs}: 3 images.*multiple of 3"):
        tiny_plan(tmp_path, study=own.STUDY, pairs=pairs).check()
    tiny_plan(tmp_path, pairs=pairs).check()  # given ones


def test_the_estimate_learns_from_what_was_measured(tmp_path):
    plan = tiny_plan(tmp_path, arms=paper.STUDY.named(["human", "sum"]))
    (plan.folder / "shared" / "labels").mkdir(parents=True)
    before = estimate(plan, set(), jobs=1)
    note_seconds(plan, "human-0", 100.0)
    note_seconds(plan, "human-0", 5.0)  # a repetition that had nothing left to do
    after = estimate(plan, {"human-0", "base"}, jobs=2)
    assert after == pytest.approx(3 * 100 / 2)
    assert after != before


# --- processes -----------------------------------------------------------------------------------

PIECES = """
import os, sys, time
from functools import partial
from pathlib import Path
from benchmarks.reproduce import children

children.PRELOAD.clear()
folder = Path(sys.argv[1])


def meet(own, other):
    (folder / own).touch()
    deadline = time.monotonic() + 30
    while not (folder / other).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    print(f"{own} met {other}")
    os.system("echo so does a child")


def fail():
    raise ValueError("as it should")


def killed():
    os.kill(os.getpid(), 9)


def sleep():
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(600)


def compute():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


if __name__ == "__main__":
    works = {"1": partial(meet, "a", "b"), "2": fail, "3": partial(meet, "b", "a"), "4": killed,
             "5": compute, "6": compute}
    if "sleep" in sys.argv:
        works = {"1": sleep, "2": sleep}
    needs = {"5": {"3"}, "6": {"2", "3"}}
    pieces = [
        children.Piece(name, folder / name / "log.txt", work, frozenset(needs.get(name, ())))
        for name, work in works.items()
    ]
    for end in children.run(pieces, jobs=2):
        print(end.piece.name, end.failed, end.seconds > 0.15)
"""


def pieces_program(folder: Path, *more: str) -> list[str]:
    """A program that runs pieces; without torch, so that it starts at once."""
    (folder / "pieces.py").write_text(PIECES)
    return [sys.executable, str(folder / "pieces.py"), str(folder), *more]


def test_pieces_run_side_by_side_and_a_failure_stops_no_other(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(pieces_program(tmp_path), env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = {name: (failed, long) for name, failed, long in map(str.split, done.stdout.splitlines())}
    failed = {name: value[0] for name, value in ends.items()}
    assert failed == {"1": "False", "2": "True", "3": "False", "4": "True", "5": "False"}
    assert ends["5"][1] == "True"  # its CPU seconds
    assert (tmp_path / "1" / "log.txt").read_text() == "a met b\nso does a child\n"
    assert "ValueError: as it should" in (tmp_path / "2" / "log.txt").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_children_end_with_their_parent(tmp_path, how):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(pieces_program(tmp_path, "sleep"), env=environment,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = descendants(parent.pid)
    pieces = {int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")}
    assert pieces <= set(family)
    parent.send_signal(how)
    parent.wait(30)
    wait_for_end(family, deadline)


def descendants(pid: int) -> list[int]:
    """Every process below this one."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [process for child in map(int, below) for process in (child, *descendants(child))]


def wait_for_end(processes: list[int], deadline: float) -> None:
    while alive := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def compare(folder: Path, *more: str) -> None:
    """The program, as a fork that has imported everything; its pieces are forks of it."""
    for name in children.PRELOAD:
        import_module(name)
    children.context = lambda: multiprocessing.get_context("fork")
    words = ["--study", "own", "--quick", "--folder", str(folder), "--jobs", "2", *more]
    be_module("benchmarks.reproduce", words)


def manifest(run: Path) -> dict[str, int]:
    """The outcomes of a run's labels."""
    return json.loads((run / "labels" / "majority" / "manifest.json").read_text())["counts"]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_killed_comparison_resumes(tmp_path):
    folder, docs = tmp_path / "reproduce", tmp_path / "page.md"
    first = start_ranks(tmp_path / "first", 1, compare, folder)
    deadline = time.monotonic() + 240
    while not (folder / "judge/evaluate/scores/base.parquet").exists():
        assert first.processes[0].is_alive(), first.output
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = descendants(first.processes[0].pid)
    assert family  # a piece
    first.kill()  # only the parent: its children must not continue without it
    wait_for_end(family, deadline)
    assert not (folder / "results").exists()
    base = (folder / "judge/evaluate/scores/base.parquet").stat().st_mtime_ns
    docs.write_text("\n".join(page.marks(own.STUDY.mark)))
    output = run_ranks(tmp_path / "again", 1, compare, folder, "--docs", str(docs))
    assert (folder / "judge/evaluate/scores/base.parquet").stat().st_mtime_ns == base
    results = json.loads((folder / "results" / "results.json").read_text())
    assert {(row["arm"], row["against"]) for row in results["results"]} == {
        ("own", "base"), ("round_2", "base"), ("round_2", "own"),
    }  # fmt: skip
    assert {row["metric"] for row in results["results"]} == {
        "hps", "clip", "pickscore", "aesthetic", "held_out", "oracle", "average",
    }  # fmt: skip
    sets = {run: manifest(folder / run) for run in ("first", "own-0", "round_2-0")}
    assert {run: sum(outcomes.values()) for run, outcomes in sets.items()} == dict.fromkeys(
        sets, 18
    )
    assert "| own pairs (round 1) |" in docs.read_text()
    assert "| Round 2 is better than round 1 | own pairs" in docs.read_text()
    assert (folder / "round_2-0" / "train" / "pipeline" / "model_index.json").is_file()
    assert not list(folder.glob("*/train/step-*"))
    assert "round 2" in output
