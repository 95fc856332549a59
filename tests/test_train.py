"""Whole runs of stage two on a tiny model: gloo ranks on CPU, every ZeRO stage."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from data.artifacts.manifest import read_manifest
from tests import rank_programs
from tests.helpers_ranks import ROOT, environment, run_ranks, shared_place, straight
from train.config import LrSchedule, ReferenceSpec, Refresh, TrainSpec, ZeroSpec
from train.trainer.trainer import learning_rate

LN_2 = 0.6931471824645996
"""ln 2 in float32."""


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_the_loss_is_ln_2_at_first_and_after_each_snapshot(stage: int, world: int):
    journal = shared_place().journal(straight(stage, world))
    assert [line["step"] for line in journal] == [1, 2, 3, 4, 5, 6]
    for line in journal:
        fresh = line["step"] in (1, 4)  # snapshots after steps 3 and 6
        assert (line["loss"] == LN_2) == fresh
        assert (line["margin"] == 0) == fresh
        assert (line["accuracy"] == 0.5) or not fresh
        assert line["reference_version"] == (line["step"] - 1) // 3
        assert line["steps_since_snapshot"] == (line["step"] - 1) % 3
        for side in ("winner", "loser"):
            same = line[f"policy_{side}_error"] == line[f"reference_{side}_error"]
            assert same == fresh
        assert line["gradient_norm"] > 0
        assert math.isfinite(line["loss"])
    assert [line["epoch"] for line in journal] == [0, 0, 0, 1, 1, 1]
    assert journal[0]["lr"] == pytest.approx(5e-4)  # half-way through a warm-up of 2
    assert {line["lr"] for line in journal[1:]} == {1e-3}


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_stages_and_ranks_agree(stage: int, world: int):
    """The same pairs, noise and arithmetic; only the order of sums may differ."""
    place = shared_place()
    plain, sharded = place.journal(straight(0, 1)), place.journal(straight(stage, world))
    for one, two in zip(plain, sharded, strict=True):
        for key in ("loss", "policy_winner_error", "reference_loser_error", "gradient_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-3), (one["step"], key)


@pytest.mark.ranks
def test_a_frozen_reference_stays_and_the_loss_leaves_ln_2():
    journal = shared_place().journal(straight(2, 1, "reference=frozen"))
    assert [line["loss"] == LN_2 for line in journal] == [True] + [False] * 5
    assert {line["reference_version"] for line in journal} == {0}
    assert [line["steps_since_snapshot"] for line in journal] == [0, 1, 2, 3, 4, 5]


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world"), [(2, 1), (3, 2)])
def test_the_result_is_a_diffusers_pipeline(tmp_path: Path, stage: int, world: int):
    place, name = shared_place(), straight(stage, world)
    pipeline = place.folder(name) / "pipeline"
    run_ranks(tmp_path, 1, draws_an_image, pipeline, place.root / "base")
    about = json.loads((pipeline / "balanceddpo.json").read_text())
    labels = read_manifest(place.root / "runs" / name / "labels" / "majority", "labels")
    assert labels is not None
    assert about["step"] == 6
    assert about["label_set_identity"] == labels.identity
    assert about["settings"]["train"]["beta"] == 5000.0
    assert "31 decided pairs" in (pipeline / "README.md").read_text()
    printed = (place.root / "logs" / name / "rank0.log").read_text()
    each = {1: "8 pairs a process x 1 · micro-batches of 4, gradient accumulation 2",
            2: "4 pairs a process x 2 · micro-batches of 4, gradient accumulation 1"}  # fmt: skip
    assert f"6 steps of 8 pairs · {each[world]} · 48 pairs seen, 2.00 epochs" in printed


def draws_an_image(pipeline: Path, base: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    trained, old = (StableDiffusionPipeline.from_pretrained(path) for path in (pipeline, base))
    trained.set_progress_bar_config(disable=True)
    image = trained(
        "a red cat", num_inference_steps=2, height=16, width=16, output_type="pt"
    ).images
    assert image.shape == (1, 3, 16, 16)
    assert torch.isfinite(image).all()
    new, was = trained.unet.state_dict(), old.unet.state_dict()
    assert new.keys() == was.keys()
    assert all(not torch.equal(new[key], was[key]) for key in new)
    for part in ("vae", "text_encoder"):
        same = zip(
            getattr(trained, part).state_dict().values(),
            getattr(old, part).state_dict().values(),
            strict=True,
        )
        assert all(torch.equal(one, two) for one, two in same)


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2)])
def test_a_step_that_is_not_finite_stops_the_run(stage: int, world: int):
    """The first step ruins the weights; the second notices, and nothing is saved after it."""
    place, name = shared_place(), f"ruined-{stage}"
    args = ("train.lr=1e30", "train.warmup=0", "train.checkpoint_every=1", f"zero=stage{stage}")
    output = place.fail(name, *args, world=world)
    assert "step 2 stopped before the optimizer step: the loss is nan" in output
    assert "Pairs: " in output
    assert "-0, " in output  # pair ids end in their occurrence number
    assert f"Last good checkpoint: {place.folder(name)}/step-0000001" in output
    assert "Traceback" not in output
    assert [path.name for path in place.folder(name).glob("*step-*")] == ["step-0000001"]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_stops_the_run(stage: int):
    place, name = shared_place(), f"steep-{stage}"
    output = place.fail(name, "train.beta=3e38", f"zero=stage{stage}")
    assert "step 1 stopped before the optimizer step: the gradient norm is" in output
    assert "Last good checkpoint: none yet" in output
    assert not list(place.folder(name).glob("*step-*"))


@pytest.mark.ranks
def test_a_ruined_gradient_changes_no_weight_under_any_stage(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.ruined_gradients, shared_place().root / "base")


@pytest.mark.ranks
def test_bf16_gradients_of_micro_batches_are_summed_in_float32(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.sums_in_float32, shared_place().root / "base")


@pytest.mark.ranks
def test_nothing_in_a_micro_batch_waits_for_the_device(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.nothing_waits, shared_place().root / "base")


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_channels_last_changes_no_more_than_rounding(stage: int):
    """At most: policy and reference are arranged alike, so the margin still starts at 0."""
    place, name = shared_place(), f"channels-last-{stage}"
    place.train(name, "train.channels_last=true", f"zero=stage{stage}", "train.checkpoint_every=6")
    for one, two in zip(place.journal(straight(2, 1)), place.journal(name), strict=True):
        assert (two["loss"] == LN_2) == (one["step"] in (1, 4))
        for key in ("loss", "policy_winner_error", "reference_loser_error", "gradient_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-3), (one["step"], key)


@pytest.mark.ranks
def test_winner_and_loser_are_mirrored_together(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.mirrored_together, shared_place().root / "base")


@pytest.mark.ranks
def test_a_finished_run_answers_at_once_and_refuses_other_settings():
    """The real command line; torch is not imported, or these would take much longer."""
    place, name = shared_place(), straight(2, 1)

    def command(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "train", *place.overrides(name, *more)],
            cwd=ROOT, env=environment() | {"PATH": ""}, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    again = command("train.log_every=3", "train.checkpoint_every=5")  # these decide nothing
    assert again.returncode == 0, again.stderr
    assert "training is done" in again.stdout
    assert "torch" not in [line.split("|")[-1].strip() for line in again.stderr.splitlines()]
    other = command("train.beta=2000", "reference=frozen")
    assert other.returncode != 0
    assert "train.beta: found 5000.0, now 2000.0" in other.stderr
    assert "train.reference.refresh: found snapshot, now frozen" in other.stderr


@pytest.mark.ranks
def test_without_labels_it_says_what_to_run():
    place = shared_place()
    log = place.fail("unlabelled", "vote=human")
    assert "labels/human holds no complete label set; run `make labels` first" in log
    assert not place.folder("unlabelled").exists()


@pytest.mark.ranks
def test_mistakes_are_found_before_a_weight_is_loaded():
    place = shared_place()
    assert "31 decided pairs" in place.fail("wide", "train.batch=32", "train.micro_batch=32")
    assert "is not a diffusers folder" in place.fail("lost", "model.path=/nowhere")
    assert "no multiple of 2" in place.fail("odd", "model.resolution=15")
    bf16 = ("train.precision=bf16", "zero=stage0")
    assert "choose zero=stage1" in place.fail("coarse", *bf16)


# --- the learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rates"),
    [
        ({}, [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        ({"warmup": 0}, [8.0] * 6),
        ({"warmup": 9}, [8 * done / 9 for done in range(1, 7)]),
        ({"lr_schedule": LrSchedule.linear}, [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]),
        ({"lr_schedule": LrSchedule.linear, "lr_end": 0.5}, [4.0, 8.0, 8.0, 7.0, 6.0, 5.0]),
        ({"lr_schedule": LrSchedule.cosine}, [4, 8, 8, 4 + 8**0.5, 4, 4 - 8**0.5]),
        ({"lr_schedule": LrSchedule.cosine, "lr_end": 0.5}, [4, 8, 8, 6 + 2**0.5, 6, 6 - 2**0.5]),
        ({"lr_schedule": LrSchedule.cosine, "lr_end": 1.0, "warmup": 0}, [8.0] * 6),
    ],
)
def test_the_learning_rate_of_each_step(change: dict[str, object], rates: list[float]):
    """A warm-up of 2 of 6 steps to a rate of 8; cos(pi / 4) is 8^0.5 / 4."""
    frozen = ReferenceSpec(refresh=Refresh.frozen)
    spec = TrainSpec(**{"steps": 6, "warmup": 2, "lr": 8.0, "reference": frozen} | change)  # type: ignore[arg-type]
    assert [learning_rate(spec, done) for done in range(6)] == pytest.approx(rates)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 10, "micro_batch": 4}, "train.batch=10 is no multiple of train.micro_batch=4"),
        ({"zero": ZeroSpec(stage=4)}, "zero.stage=4; allowed are 0, 1, 2 and 3"),
        ({"zero": ZeroSpec(stage=3), "compile": True}, "train.compile=true with zero.stage=3"),
        ({"steps": 0}, "train.steps=0; it must be at least 1"),
        ({"warmup": -1}, "train.warmup=-1; it must not be negative"),
        ({"lr_end": 0.1}, "train.lr_end=0.1 has no meaning for train.lr_schedule=constant"),
        ({"lr_schedule": LrSchedule.linear, "lr_end": 1.1}, "train.lr_end=1.1; it must be in"),
        (
            {"lr_schedule": LrSchedule.cosine, "steps": 50, "warmup": 50},
            "lr_schedule=cosine never begins: train.warmup=50 takes all of train.steps=50",
        ),
        ({"lr": 0.0}, "train.lr=0.0; it must be above 0"),
        ({"caption_dropout": 1.5}, "it is a rate in"),
        ({"reference": ReferenceSpec(every=9000)}, "never happens within"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        TrainSpec(**change)  # type: ignore[arg-type]
