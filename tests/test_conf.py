"""Every YAML composes, and every mistake gets an answer that helps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conf.job import Job, composed, settings
from data.storage.hub import HUB_ID
from label.metrics.registry import resolve
from label.metrics.weights import WeightsError

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
GROUPS = ("pairs", "panel", "vote", "model", "latents", "objective", "timesteps", "tuning",
          "reference", "zero", "prompts", "experiment", "debug")  # fmt: skip
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
MISSING = ["pairs.kind=my.layout", "pairs.root=/x", "model.path=/x", "evaluate.prompts.path=/x"]


def job(*overrides: str) -> Job:
    return composed(overrides)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes(group: str, name: str):
    assert job(f"{group}={name}", *MISSING).run


@pytest.mark.parametrize("path", sorted((CONF / "metric").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_metric_composes(path: Path):
    assert "mine" in job(f"+metric@metrics.mine={path.stem}").metrics


@pytest.mark.parametrize("panel", ["paper", "extended"])
def test_published_weights_are_asked_for_by_commit(panel: str):
    made = job(f"panel={panel}")
    assert made.panel.voters == ["hps", "clip", "pickscore", "aesthetic"]
    judges = [*made.panel.voters, *made.panel.held_out]
    for name in judges:
        spec = made.metrics[name]
        assert spec.weights.startswith("weights/") or HUB_ID.fullmatch(spec.weights)
        if name != "mps" and not spec.weights.startswith("weights/"):  # nobody says MPS's commit
            assert re.fullmatch("[0-9a-f]{40}", spec.revision or "")
        spec.revision = None  # else it would be fetched
        with pytest.raises(WeightsError, match=rf"metrics\.{name}\.weights=.*no such folder"):
            resolve(name, spec)
    assert len({made.metrics[name].weights for name in ("clip", "aesthetic")}) == 1
    assert ("image_reward" in made.panel.held_out) == (panel == "extended")


def test_the_command_line_has_the_last_word():
    made = job("train.steps=7", "train.reference.every=3", "run=other")
    assert made.train.steps == 7
    assert made.train.reference.every == 3
    assert made.folder == Path("runs/other")


def test_votes_are_weighed_in_one_word():
    assert job("vote.weights={hps: 2.0, clip: 3}").vote.weights == {"hps": 2, "clip": 3}
    assert job("vote.weights.hps=2").vote.weights == {"hps": 2}
    assert job("vote.human_votes=true", "vote.weights.human=2").vote.weights == {"human": 2}
    changed = job("vote=weighted", "vote.weights.hps=1").vote.weights
    assert changed == {"pickscore": 10, "hps": 1, "clip": 5, "aesthetic": 1}


def test_the_smoke_run_is_short_whatever_the_experiment_asks():
    made = job("debug=smoke")
    assert made.run == "smoke"
    assert (made.train.steps, made.train.reference.every) == (2, 1)
    assert made.train.validation.share > 0
    assert made.train.samples.every == 1
    assert made.evaluate.prompts.max_prompts == 8
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
        (["panel.voters=[oracle]"], ["oracle", "never votes"]),
        (["vote.weights={hsp: 2}"], ["metric 'hsp' in vote.weights", "did you mean hps?"]),
        (["vote.weights={hps: x}"], ["vote.weights", "'x'", "Float"]),
        (["panel.voters=[]"], ["panel.voters is empty"]),
        (["train.zero.stage=7"], ["zero.stage=7", "0, 1, 2 and 3"]),
        (["train.reference.every=100000"], ["train.reference.every=100000", "reference=frozen"]),
        (["train.batch=30", "train.micro_batch=7"], ["train.batch=30", "train.micro_batch=7"]),
        (["evaluate.guidance=0.5"], ["evaluate.guidance=0.5", "at least 1"]),
        (["pairs=pickapic"], ["pairs.root"]),
        (["run=a/b"], ["run='a/b'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_helpful_message(arguments: list[str], says: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "label", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr
