"""The driver of rounds: what it starts, what resumes it, what stops it, and what it reports."""

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from rich.console import Console

from conf.job import Job, composed
from data.artifacts import schemas
from data.artifacts.atomic import write_json
from data.artifacts.manifest import Manifest, describe, part_name, write_manifest
from data.artifacts.parquet_io import write_table
from data.artifacts.schemas import Role
from evaluate.config import RoundsSpec
from evaluate.reporting.plots import apart
from evaluate.reporting.summary import as_json
from evaluate.rounds.plan import STAGES, PromptBlocks, RoundsPlan
from evaluate.rounds.run import check, main, plan_of, run_rounds, start
from evaluate.run import expanded
from evaluate.statistics.winrate import Judge, compare
from generate.run import prompts_of
from tests.helpers_docs import dry_run
from tests.helpers_ranks import run_module
from tests.helpers_train import image
from tests.test_vote import METRICS, scored, votes
from train.config import LoraSpec

JUDGES = [Judge("hps", Role.VOTER), Judge("clip", Role.VOTER), Judge("held", Role.HELD_OUT)]
NUM_PROMPTS = 40


class Stages:
    """Stand-ins for the stages: they write small results, once, and can fail or be interrupted."""

    def __init__(self, quality: Callable[[str, str], float] = lambda judge, model: 0.0) -> None:
        """`quality` is what a judge adds to the scores of a model's images."""
        self.quality = quality
        self.started: list[str] = []
        self.worked: list[str] = []
        self.fails_at = ""

    def __call__(self, words: Sequence[str]) -> int:
        stage, settings = words[2], dict(word.split("=", 1) for word in words[3:])
        folder = Path(settings["runs"]) / settings["run"]
        step = f"{folder.name} {stage}"
        self.started.append(step)
        if step == self.fails_at:
            self.fails_at = ""
            return 2
        if not (folder / stage / "done").exists():
            getattr(self, stage)(folder, settings)
            (folder / stage).mkdir(parents=True, exist_ok=True)
            (folder / stage / "done").touch()
            self.worked.append(step)
        return 0

    def generate(self, folder: Path, settings: dict[str, str]) -> None:
        pass

    def train(self, folder: Path, settings: dict[str, str]) -> None:
        (folder / "train" / "pipeline").mkdir(parents=True)

    def label(self, folder: Path, settings: dict[str, str]) -> None:
        from label.config import VoteSpec
        from label.voting.rules import VotingRule, label_pairs

        frame = scored(votes((1, 1, 1, 1), (1, 1, 1, -1), (1, 1, -1, -1)))
        labelled = label_pairs(frame, VotingRule(VoteSpec(), METRICS))
        path = folder / "labels" / "majority" / part_name(0)
        write_table(path, labelled.to_arrow().cast(schemas.labels(METRICS)), {})
        write_manifest(path.parent, Manifest(kind="labels", settings={}, files=[describe(path)]))

    def evaluate(self, folder: Path, settings: dict[str, str]) -> None:
        models = {
            name.removeprefix("models."): path
            for name, path in settings.items()
            if name.startswith("models.")
        }
        noise, rows = np.random.default_rng(0).normal(size=(NUM_PROMPTS, len(JUDGES))), []
        for model in models:
            path = folder / "evaluate" / "samples" / model / "image.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image(len(rows)))
            for prompt in range(NUM_PROMPTS):
                row = {"prompts_name": "test", "prompt_id": prompt, "prompt": f"prompt {prompt}"}
                row |= {"seed": 0, "model": model, "path": f"samples/{model}/image.png"}
                rows.append(row | {
                    f"score_{judge.metric}": self.quality(judge.metric, model) + x
                    for judge, x in zip(JUDGES, noise[prompt], strict=True)
                })  # fmt: skip
        names = [judge.metric for judge in JUDGES]
        table = pa.Table.from_pylist(rows, schema=schemas.sample_scores(names))
        write_table(folder / "evaluate" / "scores.parquet", table, {})
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        judges = {j.metric: {"role": j.role.value, "tie": j.tie} for j in JUDGES}
        compared = [
            as_json(compare(frame, JUDGES, "base", model, resamples=100, seed=0))
            | {"distance": {"denoiser": {"mean": {"fraction": int(model[-1]) / 10}}}}
            for model in models
            if model != "base"
        ]
        write_json(folder / "evaluate" / "winrates.json", {
            "prompts": {"name": "test", "prompts": NUM_PROMPTS},
            "comparisons": compared,
            "settings": {"judges": judges, "resamples": 100, "seed": 0},
        })  # fmt: skip


@cache
def composed_job() -> Job:
    return composed(["experiment=miniature_own", "run=r"])


def job_of(tmp_path: Path, **rounds: Any) -> Job:
    job = composed_job()
    return replace(
        job,
        runs=str(tmp_path),
        pairs=replace(job.pairs, root=str(tmp_path / "r" / "pairs")),
        rounds=RoundsSpec(**{"count": 2} | rounds),
        evaluate=replace(job.evaluate, gallery_pairs=3),
    )


def run(job: Job, stages: Stages, tmp_path: Path) -> str:
    values = {"folder": job.folder, "settings": (f"runs={tmp_path}",), "spec": job.rounds}
    return run_rounds(job, plan(**values), ["python", "-m"], stages, Console(width=200))


EVERY = [f"round-{number} {stage}" for number in (1, 2) for stage in STAGES]


@pytest.mark.slow
def test_rounds_resume_after_any_stage_and_continue_with_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("evaluate.reporting.plots.by_round", lambda _: "")  # takes a second
    job, stages = job_of(tmp_path), Stages()
    for step in EVERY:
        stages.fails_at, stages.started = step, []
        with pytest.raises(SystemExit) as stopped:
            run(job, stages, tmp_path)
        assert stopped.value.code == 2
        assert stages.started == EVERY[: EVERY.index(step) + 1]
        number, stage = step.removeprefix("round-").split()
        said = capsys.readouterr().out
        assert f"round {number}, {stage} ended with status 2" in said
        assert "rerun the same command, it resumes" in said
        assert (tmp_path / "r" / "rounds.json").exists() is (number == "2")
    assert run(job, stages, tmp_path) == ""
    assert stages.worked == EVERY  # each once, in order
    before = json.loads((tmp_path / "r" / "rounds.json").read_text())
    assert run(job, stages, tmp_path) == ""
    assert json.loads((tmp_path / "r" / "rounds.json").read_text()) == before
    assert run(replace(job, rounds=RoundsSpec(count=3)), stages, tmp_path) == ""
    assert stages.worked == [*EVERY, *(f"round-3 {stage}" for stage in STAGES)]


@pytest.mark.slow
def test_a_held_out_judge_stops_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Round 2 is worse than round 1 and better than the base, which the head to head shows."""
    gains = {"base": 0.0, "round-1": 6.0, "round-2": 3.0, "round-3": 9.0}
    stages = Stages(lambda judge, model: gains[model] if judge == "held" else 0.0)
    job = job_of(tmp_path, count=3)
    reason = run(job, stages, tmp_path)
    assert "held, a held-out judge, says that round-2 is worse than round-1: it wins" in reason
    assert stages.started == EVERY
    said = capsys.readouterr().out
    assert "stopped; rounds.stop_when_worse=false continues" in said
    assert reason in (tmp_path / "r" / "rounds.html").read_text()
    again = replace(job, rounds=replace(job.rounds, stop_when_worse=False))
    assert run(again, stages, tmp_path) == ""
    assert stages.worked[-1] == "round-3 evaluate"
    assert f"after round 2: {reason}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_voter_stops_nothing(tmp_path: Path):
    stages = Stages(lambda judge, model: -9.0 * (model == "round-2") * (judge != "held"))
    assert run(job_of(tmp_path), stages, tmp_path) == ""


@pytest.mark.slow
def test_the_report_has_every_round_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gains = {"base": 0.0, "round-1": 4.0, "round-2": 8.0}
    run(job_of(tmp_path), Stages(lambda judge, model: gains[model]), tmp_path)
    page, said = (tmp_path / "r" / "rounds.html").read_text(), capsys.readouterr().out
    for text in ("Against the base", "Against the round before", "Labels by round", "held out",
                 'href="round-1/evaluate/report.html"', "round-2 is better than round-1 on 2 of 2",
                 "2 of 2, judged on 40 prompts of test"):  # fmt: skip
        assert text in page, text
    assert "<script" not in page
    assert page.count('<div class="card">') == 3
    assert page.count("<img ") == 3 * 3  # the base and both rounds
    assert '<td class="number">10 %</td>' in page
    assert '<td class="number">20 %</td>' in page
    assert "distance" in said
    for text in ("Against the base", "Against the round before", "Labels", "(held out)", "33.3%"):
        assert text in said, text
    first, second = json.loads((tmp_path / "r" / "rounds.json").read_text())["rounds"]
    assert first["against_previous"] is None
    assert second["against_previous"]["base"] == "round-1"
    assert second["against_base"]["rates"][2]["win_rate"]["value"] == pytest.approx(1.0)
    labels = first["labels"]
    assert (labels["pairs"], labels["decided"]) == (3, 2)
    assert labels["tied"] == pytest.approx(1 / 3)
    assert labels["margin"] == pytest.approx((4 + 2) / 2)
    # equal votes of a, b, c, d on three pairs: 3 of 3 for three couples, 1 or 2 of 3 for the others
    assert labels["agreement"] == pytest.approx(np.mean([3, 2, 1, 2, 1, 2]) / 3)


def test_names_beside_a_plot_do_not_overlap():
    moved = apart([50.0, 50.0, 90.0, 52.0], least=7.0)
    assert moved[0] < moved[1] < moved[3] < moved[2]
    assert min(np.diff(sorted(moved))) >= 7 - 1e-9
    assert np.mean(moved) == pytest.approx(60.5)
    assert apart([0.0, 0.0, 0.0], least=7.0) == [0, 7, 14]
    assert apart([100.0, 100.0], least=7.0) == [93, 100]


# --- commands ------------------------------------------------------------------------------------


def plan(**changes: Any) -> RoundsPlan:
    values = {
        "spec": RoundsSpec(), "folder": Path("runs/r"), "run": "r", "settings": ("seed=3",),
        "base": "owner/model@" + 40 * "0", "base_name": "base", "first_seed": 5,
        "prompts": PromptBlocks(100, 40), "judged": "evaluate", "vote": "majority",
    }  # fmt: skip
    return RoundsPlan(**values | changes)


def test_each_round_begins_with_the_policy_of_the_one_before():
    first, second = (plan().commands(number) for number in (1, 2))
    assert [command.stage for command in first] == list(STAGES)
    assert all("seed=3" in command.settings for command in [*first, *second])
    assert not any("model.path" in word for command in first for word in command.settings)
    for command in second[:3]:
        assert "model.path=runs/r/round-1/train/pipeline" in command.settings
        assert "model.revision=null" in command.settings
    judged = second[3].settings
    assert judged[-4:] == (
        f"models.base=owner/model@{40 * '0'}",
        "models.round-1=runs/r/round-1/train/pipeline",
        "models.round-2=runs/r/round-2/train/pipeline",
        "evaluate.reuse=runs/r/round-1/evaluate",
    )
    assert not any("reuse" in word for command in first for word in command.settings)
    assert not any("model.path" in word for word in judged)  # the base is the experiment's


def test_prompts_are_new_as_long_as_there_are_any():
    blocks = PromptBlocks(available=100, wanted=40, skipped=7)
    assert [blocks.first(n) for n in (1, 2, 3, 4)] == [7, 47, 7, 47]
    assert [blocks.same_as(n) for n in (1, 2, 3, 4)] == [None, None, 1, 2]
    assert blocks.notes(2) == []
    (note,) = blocks.notes(3)
    assert "3 rounds of 40 prompts need 120, and generate.prompts has 100; from round 3 on" in note
    every = PromptBlocks(available=100)
    assert (every.size, every.same_as(2)) == (100, 1)
    assert PromptBlocks(available=10, wanted=40).size == 10
    settings = [plan().commands(n)[0].settings for n in (1, 2, 3)]
    assert [words[-1] for words in settings] == [
        "generate.prompts.skip_prompts=0", "generate.prompts.skip_prompts=40",
        "generate.first_seed=2000005",
    ]  # fmt: skip


@pytest.mark.slow
def test_what_was_typed_goes_to_every_stage_and_prompts_are_disjoint(tmp_path: Path):
    words = [
        "experiment=miniature_own",
        f"runs={tmp_path}",
        "run=r",
        "rounds.count=7",
        "goal=label",
    ]
    job = job_of(tmp_path)
    prompts = replace(job.generate.prompts, max_prompts=30)
    job = replace(job, generate=replace(job.generate, prompts=prompts))
    rounds, texts = plan_of(job, words), set[str]()
    assert rounds.settings == ("experiment=miniature_own", f"runs={tmp_path}")
    assert rounds.base == "data/miniature/weights/base"
    assert rounds.prompts.available > 800
    for number in (1, 2, 3):
        name, _, skipped = rounds.commands(number)[0].settings[-1].partition("=")
        assert name == "generate.prompts.skip_prompts"
        block = replace(prompts, skip_prompts=int(skipped))
        own = prompts_of(replace(job, generate=replace(job.generate, prompts=block))).prompts
        assert len(own) == 30
        assert texts.isdisjoint(prompt.text for prompt in own)
        texts |= {prompt.text for prompt in own}


def test_earlier_pairs_are_mixed_in_from_round_2_on():
    mixed = plan(spec=RoundsSpec(mix=0.6), settings=("pairs=own", "seed=3"))
    first, second, third = (mixed.commands(number) for number in (1, 2, 3))
    assert not any("mixture" in word for command in first for word in command.settings)
    assert "pairs=own" in second[0].settings  # generated as ever
    for command in second[1:]:
        assert "pairs=own" not in command.settings
        assert "pairs.root=runs/r/round-2/pairs" in command.settings
        assert "pairs.options.fraction=0.5" in command.settings  # all there is
    others = next(word for word in third[1].settings if "others" in word)
    assert others.count("kind: ") == 2
    assert 'root: "runs/r/round-1/pairs"' in others
    assert "pairs.options.fraction=0.6" in third[1].settings
    assert [mixed.mixed_fraction(number) for number in (1, 2, 3)] == [0, 0.5, 0.6]


@pytest.mark.slow
def test_a_given_set_is_mixed_in_from_round_1_on_and_the_command_composes():
    words = [
        "rounds.mix=0.25", "pairs@rounds.mix_pairs=jsonl", "rounds.mix_pairs.root=/data/a, b",
        "rounds.mix_pairs.max_pairs=100",
    ]  # fmt: skip
    spec = composed(["experiment=miniature_own", *words]).rounds
    assert spec.mix_pairs.kind == "jsonl"
    command = plan(spec=spec).commands(1)[1]
    pairs = composed(["experiment=miniature_own", *command.settings]).pairs
    assert pairs.kind == "mixture"
    assert pairs.options["fraction"] == 0.25
    assert pairs.options["seed"] == 3
    (other,) = pairs.options["others"]
    assert other["root"] == "/data/a, b"
    assert other["max_pairs"] == 100
    assert other["images"] == "paths"
    assert other["columns"]["image_0"] == "image_0"


@pytest.mark.slow
def test_names_of_rounds_are_settings_that_evaluate_takes():
    words = [expanded(word) for word in plan().commands(2)[3].settings]
    job = composed(["experiment=miniature_own", *words])
    assert job.run == "r/round-2"
    assert job.evaluate.models["round-1"] == "runs/r/round-1/train/pipeline"
    assert job.folder == Path("runs/r/round-2")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"count": 0}, r"rounds\.count=0 \(ROUNDS\); it must be at least 1"),
        ({"mix": 1.0}, r"rounds\.mix=1\.0; it is a fraction"),
        ({"mix": -0.1}, r"rounds\.mix=-0\.1"),
        ({"launcher": "srun 'python"}, r"rounds\.launcher=.* cannot be cut into words"),
    ],
)
def test_impossible_rounds_are_refused(spec: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        RoundsSpec(**spec)


LORA = LoraSpec(rank=None, start="x.safetensors")


@pytest.mark.slow
def test_what_the_rounds_decide_themselves_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = job_of(tmp_path)
    check(job)
    for other, says in (
        (replace(job, pairs=replace(job.pairs, kind="pickapic")), "choose pairs=own"),
        (replace(job, pairs=replace(job.pairs, root="/x")), "pairs.root=/x"),
        (replace(job, generate=replace(job.generate, models={"a": "/x"})), "generate.models nam"),
        (replace(job, evaluate=replace(job.evaluate, models={"a": "/x"})), "evaluate.models nam"),
        (replace(job, evaluate=replace(job.evaluate, scores_only=True)), "finishes no round"),
        (replace(job, label=replace(job.label, inspect=True)), "label.inspect=true finishes no"),
        (replace(job, train=replace(job.train, lora=LORA)), "train.lora.start=x.safetensors is an"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            check(other)
    with pytest.raises(ValueError, match="no-such-launcher is no program of this machine"):
        main(job_of(tmp_path, launcher="no-such-launcher -m"), [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started once.*rounds\.launcher"):
        check(job)


def test_make_hands_rounds_and_processes_on():
    (line,) = [
        line
        for line in dry_run(
            "rounds", "EXP=miniature_own", "ROUNDS=5", "NPROC=2"
        ).stdout.splitlines()
        if "evaluate.rounds" in line
    ]
    words = shlex.split(line)
    assert "rounds.count=5" in words
    (launcher,) = [word for word in words if word.startswith("rounds.launcher=")]
    assert launcher.endswith("torchrun --standalone --nproc-per-node=2 -m")
    alone = dry_run("rounds", "EXP=miniature_own", "NPROC=1").stdout
    assert "rounds.launcher" not in alone
    assert "rounds.count" not in alone


# --- child processes -----------------------------------------------------------------------------


def signalled(number: int, command: list[str]) -> tuple[BaseException, float]:
    """How `start` ends when this process gets a signal, and how long it took."""
    timer = Timer(0.3, os.kill, (os.getpid(), number))
    begun = time.monotonic()
    timer.start()
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - SystemExit or KeyboardInterrupt
        start(command)
    timer.join()
    return caught.value, time.monotonic() - begun


@pytest.mark.slow
def test_a_stage_ends_with_the_rounds(tmp_path: Path, request: pytest.FixtureRequest):
    # A shell that starts all tests in the background lets them ignore SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = signal.getsignal(signal.SIGTERM)
    error, seconds = signalled(signal.SIGTERM, ["sleep", "60"])
    assert isinstance(error, SystemExit)
    assert error.code == 128 + signal.SIGTERM
    assert seconds < 30
    end = tmp_path / "end"
    error, _ = signalled(signal.SIGINT, ["sh", "-c", f"sleep 0.8; touch {end}"])
    assert isinstance(error, KeyboardInterrupt)
    assert end.exists()  # the terminal interrupts the stage, which ends by itself
    assert signal.getsignal(signal.SIGTERM) is before
    assert start(["sh", "-c", "exit 7"]) == 7


# --- in earnest ----------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.slow
def test_two_small_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Everything real but the numbers: two images of six prompts, two steps, half mixed in."""
    words = [
        "experiment=miniature_own", f"runs={tmp_path}", "run=small", "rounds.count=2",
        "rounds.mix=0.5", "generate.prompts.max_prompts=6", "generate.images=2",
        "generate.steps=1", "train.steps=2", "train.batch=2", "train.micro_batch=2",
        "train.warmup=1", "train.reference.every=1", "evaluate.steps=1",
        "evaluate.prompts.max_prompts=3", "evaluate.resamples=50", "evaluate.gallery_pairs=2",
        "panel.voters=[clip]", "panel.held_out=[]", "panel.oracle=[]",
    ]  # fmt: skip
    job = composed(words)

    def start_fork(command: Sequence[str]) -> int:
        done = run_module(tmp_path / "logs" / str(len(said)), *command[2:])
        said.append(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    said: list[str] = []
    assert run_rounds(job, plan_of(job, words), ["python", "-m"], start_fork, Console()) == ""
    assert len(said) == 8
    run = tmp_path / "small"
    shared = ["base", "round-1"]  # the base and the round before are sampled once
    counts = [
        {path.stat().st_nlink for path in (run / "round-2/evaluate/samples" / name).glob("*.png")}
        for name in (*shared, "round-2")
    ]
    assert counts == [{2}, {2}, {1}]
    assert all(f"3 images of {name} are those of" in said[-1] for name in shared)
    labels = pl.read_parquet(run / "round-2" / "labels" / "majority" / "part-*.parquet")
    assert labels["source"].str.starts_with("others.0/").sum() == 6 == len(labels) / 2
    first = pl.read_parquet(run / "round-1" / "pairs" / "*.parquet")
    second = pl.read_parquet(run / "round-2" / "pairs" / "*.parquet")
    assert set(first["caption"]).isdisjoint(second["caption"])
    assert set(first["fingerprint_0"]).isdisjoint(second["fingerprint_0"])  # another policy
    assert (run / "rounds.html").is_file()
    capsys.readouterr()
    main(replace(job, rounds=replace(job.rounds, dry_run=True)), words)
    assert capsys.readouterr().out.count(" -m ") == 8
