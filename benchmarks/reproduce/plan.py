"""What is trained, sampled and judged, and about how long it takes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.reproduce.arms import Arm
from conf.job import Job, composed
from data.artifacts.atomic import write_json

SHARED = "shared"
"""The run that scores the pairs once and makes the labels of every arm."""
JUDGE = "judge"
"""The run whose folder holds all images and their scores."""
BASE = "base"

LATENTS = ("latents=model", "label.latents.moments=true", "label.latents.dtype=fp32",
           "train.latents=always")  # fmt: skip
"""Each image is encoded once for all trainings; the trained weights are the same to the bit."""

SECONDS = {"labels": 60.0, "step": 0.6, "image": 0.065, "judgement": 0.005, "start": 6.0}
"""CPU seconds on one core of a two-core cloud machine (AMD EPYC); used until a unit of this folder
has been timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole comparison."""

    folder: Path
    arms: tuple[Arm, ...]
    seeds: int
    """Trainings of each arm."""
    steps: int
    prompts: int
    pairs: int
    extra: tuple[str, ...] = ()
    """Further settings of every run; they override all others."""

    @property
    def common(self) -> list[str]:
        """The settings that every run shares."""
        return [
            "experiment=miniature",
            f"runs={self.folder}",
            f"pairs.options.num_pairs={self.pairs}",
            f"train.steps={self.steps}",
            "train.keep=1",
            "train.checkpoint_every=25",
            "train.log_every=5",
            f"evaluate.prompts.max_prompts={self.prompts}",
            *LATENTS,
        ]

    def units(self) -> Iterator["Unit"]:
        """The base, then seed after seed, so that finished arms can be compared early."""
        yield Unit(None, 0)
        for seed in range(self.seeds):
            for arm in self.arms:
                yield Unit(arm, seed)

    def labels_job(self, arm: Arm, seed: int) -> Job:
        """Stage one of an arm, in the folder shared by all arms."""
        own = [f"seed={seed}", f"run={SHARED}"]
        return composed([*self.common, *arm.settings(seed), *own, *self.extra])

    def train_job(self, unit: "Unit") -> Job:
        """Stage two of an arm, in a run folder of its own."""
        assert unit.arm is not None
        own = [f"seed={unit.seed}", f"run={unit.name}"]
        return composed([*self.common, *unit.arm.settings(unit.seed), *own, *self.extra])

    @property
    def judge_job(self) -> Job:
        """Sampling and judging; the initial noise is the same for every arm and training seed."""
        return _composed((*self.common, "seed=0", f"run={JUDGE}", *self.extra))


@cache
def _composed(overrides: tuple[str, ...]) -> Job:
    return composed(overrides)


@dataclass(frozen=True, slots=True)
class Unit:
    """A model to train, sample and judge; without an arm it is the base."""

    arm: Arm | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder and of its images' folder."""
        return f"{self.arm.name}-{self.seed}" if self.arm else BASE


def seconds_file(plan: Plan) -> Path:
    """The file with the measured seconds of finished units."""
    return plan.folder / "seconds.json"


def measured(plan: Plan) -> dict[str, float]:
    """Unit -> CPU seconds, for units that were made without interruption."""
    path = seconds_file(plan)
    seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return seconds


def note_seconds(plan: Plan, name: str, seconds: float) -> None:
    """Record how long a unit took; the first measurement is kept."""
    known = measured(plan)
    if name not in known:
        write_json(seconds_file(plan), known | {name: round(seconds, 1)})


def expected(plan: Plan, unit: Unit, known: Mapping[str, float]) -> float:
    """CPU seconds that a unit is likely to take, from the units measured so far."""
    if unit.name in known:
        return known[unit.name]
    if unit.arm and (trained := [seconds for name, seconds in known.items() if "-" in name]):
        return sum(trained) / len(trained)
    judged = plan.prompts * (SECONDS["image"] + SECONDS["judgement"])
    return judged + (plan.steps * SECONDS["step"] + SECONDS["start"] if unit.arm else 0.0)


def estimate(plan: Plan, done: set[str], jobs: int) -> float:
    """Seconds that are left with `jobs` processes."""
    known = measured(plan)
    left = sum(expected(plan, unit, known) for unit in plan.units() if unit.name not in done)
    return left / jobs + (0.0 if (plan.folder / SHARED).exists() else SECONDS["labels"])
