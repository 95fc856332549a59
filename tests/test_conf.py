"""Every YAML composes, and every mistake gets an answer that helps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.job import Job, composed, entry, settings
from data.storage.hub import HUB_ID
from label.metrics.registry import resolve
from label.metrics.weights import WeightsError
from label.run import main
from tests import helpers_compose
from train.config import OptimizerKind, Quantize
from train.run import check as check_training

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
GROUPS = ("pairs", "panel", "vote", "model", "latents", "texts", "objective", "optimizer",
          "timesteps", "tuning", "reference", "zero", "prompts", "debug")  # fmt: skip
CHOICES = {group: [path.stem for path in sorted((CONF / group).glob("*.yaml"))] for group in GROUPS}
MISSING = ["pairs.kind=my.layout", "pairs.root=/x", "model.path=/x", "evaluate.prompts.path=/x"]


def job(*overrides: str) -> Job:
    return composed(overrides)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(max(map(len, CHOICES.values()))))
def test_every_choice_composes(turn: int):
    """Several groups at once, or one by one where two choices exclude each other."""
    chosen = [f"{group}={names[turn % len(names)]}" for group, names in CHOICES.items()]
    for some in (chosen[:8], chosen[8:]):
        try:
            assert job(*some, *MISSING).run
        except ValueError:
            for choice in some:
                assert job(choice, *MISSING).run


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in (CONF / "experiment").glob("*.yaml")])
def test_every_experiment_composes(name: str):
    assert job(f"experiment={name}", *MISSING).run


@pytest.mark.parametrize(
    "line",
    [
        ("pairs=pickapic", "pairs.root=/x", "zero=stage3", "+pairs.options.a=[1,b]"),
        ("experiment=sd15_pickapic", "train.lr=1e-5", "~metrics.clip", "++vote.votes=2"),
        ("+metric@metrics.more=miniature_oracle", "panel.held_out=[more]", "run='a b'"),
        ("debug=smoke", "run=mine", "vote=weighted", "vote.weights.hps=1"),
    ],
)
def test_settings_of_tests_are_those_that_hydra_composes(
    line: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    expected = helpers_compose.by_hydra(line)
    assert helpers_compose.compose(line) == expected
    monkeypatch.setattr(helpers_compose, "by_hydra", None)  # nothing is left to it any more
    assert helpers_compose.compose(line) == expected


def test_every_metric_composes():
    names = [path.stem for path in (CONF / "metric").glob("*.yaml")]
    metrics = job(*[f"+metric@metrics.my_{name}={name}" for name in names]).metrics
    assert {f"my_{name}" for name in names} <= metrics.keys()


@pytest.mark.parametrize("panel", ["paper", "extended"])
def test_published_weights_are_asked_for_by_commit(panel: str):
    config = job(f"panel={panel}")
    assert config.panel.voters == ["hps", "clip", "pickscore", "aesthetic"]
    judges = [*config.panel.voters, *config.panel.held_out]
    for name in judges:
        spec = config.metrics[name]
        assert spec.weights.startswith("weights/") or HUB_ID.fullmatch(spec.weights)
        if name != "mps" and not spec.weights.startswith("weights/"):  # nobody says MPS's commit
            assert re.fullmatch("[0-9a-f]{40}", spec.revision or "")
        spec.revision = None  # else it would be fetched
        with pytest.raises(WeightsError, match=rf"metrics\.{name}\.weights=.*no such folder"):
            resolve(name, spec)
    assert len({config.metrics[name].weights for name in ("clip", "aesthetic")}) == 1
    assert ("image_reward" in config.panel.held_out) == (panel == "extended")


@pytest.mark.parametrize(
    "name", ["sd35_medium", "flux_dev_lora", "z_image_lora", "sana_lora", "qwen_image_lora"]
)
def test_models_without_a_known_commit_ask_for_one(name: str):
    """Before anything is loaded; `make eval` asks before stage one, too."""
    config = job(f"experiment={name}", "pairs.root=/x")
    with pytest.raises(ValueError, match=r"model\.path=.*40-digit commit in model\.revision"):
        check_training(config)
    config.model.path = "/models/mine"
    with pytest.raises(ValueError, match=r"model\.path=/models/mine"):
        check_training(config)


def test_a_preset_is_that_of_the_model_whoever_chose_it():
    """It outranks the experiment, which chose the model, and the command line outranks it."""
    config = job("experiment=flux_dev_lora", "+preset=12gb", "pairs.root=/x", "latents=none")
    assert config.model.quantize is Quantize.nf4
    assert (config.train.micro_batch, config.train.lora.rank) == (1, 32)
    assert not config.label.latents.write
    assert config.label.texts.write
    config = job("+preset='48gb'", "model=sdxl", "train.micro_batch=2", "model.path=/models/x=1")
    assert config.train.optimizer.kind is OptimizerKind.adamw8bit
    assert (config.train.micro_batch, config.train.lora.rank) == (2, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            ["+preset=24gb"],
            "no settings for model=miniature; there are some for flux_dev, qwen_image, sana",
        ),
        (
            ["+preset=12gb", "model=qwen_image"],
            r"no preset=12gb for model=qwen_image, which does not fit there .*: 24gb, 48gb, 80gb",
        ),
        (["+preset=16gb", "model=sd15"], r"'16gb' for model=sd15; did you mean .*: 12gb, 24gb, "),
        (
            ["+preset=24gb", "preset=48gb", "model=sd15"],
            "preset=24gb and preset=48gb are several",
        ),
        (["+preset/sd15=24gb", "model=sdxl"], "is for model=sd15, but the model is sdxl; write"),
        (
            ["+preset=24gb", "model=sdxl", "tuning=full"],
            "SDXL .*: LoRA.* rate .*train.lr",
        ),
    ],
)
def test_a_preset_that_is_not_there_is_refused(line: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        job(*line)


def test_a_command_says_which_preset_it_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["train", "+preset=24gb", "model=sdxl", "train.beta=x"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit):
        entry(main)()
    words = "preset: conf/preset/sdxl/24gb.yaml: SDXL at 1024 pixels on one GPU of 24 GB: LoRA."
    assert words in capsys.readouterr().out


def test_the_command_line_has_the_last_word():
    config = job("train.steps=7", "train.reference.every=3", "run=other")
    assert config.train.steps == 7
    assert config.train.reference.every == 3
    assert config.folder == Path("runs/other")


def test_votes_are_weighed_in_one_word():
    assert job("vote.weights={hps: 2.0, clip: 3}").vote.weights == {"hps": 2, "clip": 3}
    assert job("vote.weights.hps=2").vote.weights == {"hps": 2}
    assert job("vote.human_votes=true", "vote.weights.human=2").vote.weights == {"human": 2}
    changed = job("vote=weighted", "vote.weights.hps=1").vote.weights
    assert changed == {"pickscore": 10, "hps": 1, "clip": 5, "aesthetic": 1}


def test_the_smoke_run_is_short_whatever_the_experiment_asks():
    config = job("debug=smoke")
    assert config.run == "smoke"
    assert (config.train.steps, config.train.reference.every) == (2, 1)
    assert config.train.validation.share > 0
    assert config.train.samples.every == 1
    assert config.evaluate.prompts.max_prompts == 8
    assert job("debug=smoke", "run=mine").run == "mine"


def test_settings_are_plain_values():
    plain = settings(job())
    assert plain["vote"]["rule"] == "majority"
    assert plain["train"]["reference"]["refresh"] == "snapshot"
    assert plain["metrics"]["clip"]["kind"] == "clip"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.bta=3"], ["train.bta", "did you mean train.beta?", "warmup"]),
        (["trian.lr=3"], ["trian", "did you mean train?"]),
        (["experiment=miniatur"], ["experiment 'miniatur'", "did you mean miniature?"]),
        (["vote=majorit"], ["vote 'majorit'", "did you mean majority?", "unanimous"]),
        (["train.lr=abc"], ["train.lr", "abc", "Float"]),
        (["vote.rule=majorty"], ["vote.rule", "majorty", "unanimous"]),
        (["panel.voters=[clp]"], ["metric 'clp'", "did you mean clip?"]),
        (["panel.voters=[oracle]", "panel.oracle=[]"], ["oracle", "never votes"]),
        (["vote.weights={hsp: 2}"], ["metric 'hsp' in vote.weights", "did you mean hps?"]),
        (["vote.weights={hps: x}"], ["vote.weights", "'x'", "Float"]),
        (["panel.voters=[]"], ["panel.voters is empty"]),
        (["train.zero.stage=7"], ["zero.stage=7", "0, 1, 2 and 3"]),
        (["train.reference.every=100000"], ["train.reference.every=100000", "reference=frozen"]),
        (["train.batch=30", "train.micro_batch=7"], ["train.batch=30", "train.micro_batch=7"]),
        (["evaluate.guidance=0.5"], ["evaluate.guidance=0.5", "at least 1"]),
        (["pairs=pickapic"], ["pairs.root"]),
        (["run=a//b"], ["run='a//b'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_helpful_message(
    arguments: list[str],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["label", *arguments])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as stopped:
        entry(main)()
    assert stopped.value.code == 2
    answer = capsys.readouterr().err
    for words in says:
        assert words in answer


def test_a_mistake_shows_no_traceback():
    """The real command line."""
    done = subprocess.run(
        [sys.executable, "-m", "label", "train.bta=3"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean train.beta?" in done.stderr
    assert "Traceback" not in done.stderr
