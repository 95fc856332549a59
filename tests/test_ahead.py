"""`make eval` tells at its start what is wrong with any of its stages."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf import ahead
from conf.job import Goal
from tests.test_conf import job

ROOT = Path(__file__).parent.parent


def check(tmp_path: Path, stage: str, *more: str) -> None:
    ahead.check_later_stages(stage, job(f"runs={tmp_path}", "goal=evaluate", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.path=/nowhere"], r"model\.path=/nowhere is not a diffusers folder"),
        (["model.path=/nowhere.ckpt"], "is a pickled file"),
        (["model.path=some/where"], r"40-digit commit in model\.revision"),
        (["evaluate.prompts.path=/nope", "prompts=lines"], r"evaluate\.prompts\.path=/nope is no"),
        (["metrics.held_out.weights=/nope"], r"metrics\.held_out\.weights=/nope"),
        (["+evaluate.models={base: /nope, ours: /nope}"], "'base': /nope is no folder"),
        (["buckets=free"], r"no size but the square of model\.resolution=64 .*step=64"),
        (["evaluate.width=100"], r"evaluate\.width=100 is no multiple of 8"),
        (["evaluate.steps=5000"], r"evaluate\.steps=5000: model 'base' .* has 1000 timesteps"),
    ],
)
def test_paths_of_later_stages_are_checked_before_labels_are_made(
    more: list[str], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        check(tmp_path, "label", *more)
    assert not list(tmp_path.iterdir())


def test_prompts_that_a_judge_cannot_read_are_told_before_labels_are_made(tmp_path: Path):
    (tmp_path / "p.txt").write_text("a red cat\n")
    more = ("prompts=lines", f"evaluate.prompts.path={tmp_path}/p.txt")
    with pytest.raises(ValueError, match="oracle cannot judge 1 of the 1 prompts of lines"):
        check(tmp_path, "label", *more)
    check(tmp_path, "label", *more, "evaluate.unreadable=leave_out")


def test_what_is_well_passes_and_costs_no_torch(tmp_path: Path):
    program = (
        "import sys; from conf.job import composed; from conf.ahead import check_later_stages; "
        f"check_later_stages('label', composed(['runs={tmp_path}', 'goal=evaluate'])); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert not list(tmp_path.iterdir())


def test_only_stages_up_to_the_goal_are_checked_and_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checked: list[str] = []
    for stage in ahead.STAGES[1:]:
        monkeypatch.setattr(f"{stage}.run.check", lambda _, stage=stage: checked.append(stage))
    for stage, goal in (("label", Goal.train), ("train", Goal.train), ("label", None)):
        built = job(f"runs={tmp_path}")
        built.goal = goal
        ahead.check_later_stages(stage, built)
    assert checked == ["train"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(tmp_path, "label")
    assert checked == ["train"]


@pytest.mark.parametrize(
    ("target", "goals"),
    [("eval", ["evaluate"] * 3), ("train", ["train"] * 2), ("labels", [])],
)
def test_make_says_with_which_stage_it_ends(target: str, goals: list[str]):
    shown = subprocess.run(
        ["make", "-n", target, "NPROC=1"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    words = [word for word in shown.split() if word.startswith("goal=")]
    assert words == [f"goal={goal}" for goal in goals]


def test_the_first_stage_refuses_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from label.run import main

    monkeypatch.setattr("label.run.open_pairs", None)
    with pytest.raises(ValueError, match=r"model\.path=/nowhere"):
        main(job(f"runs={tmp_path}", "goal=train", "model.path=/nowhere"))
