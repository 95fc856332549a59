"""What is trained, sampled and judged, and about how long it takes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.reproduce.study import Arm, Grid, PairSet, Study
from conf.job import Job, composed
from data.artifacts.atomic import write_json
from data.miniature.scenes import prompts

JUDGE, VALIDATION = "judge", "validation"
"""The runs whose folders hold all images and their scores: of test prompts and of the prompts on
which beta is chosen."""
BASE = "base"

LATENTS = ("latents=model", "label.latents.moments=true", "label.latents.dtype=fp32",
           "train.latents=always")  # fmt: skip
"""Each image is encoded once for all trainings."""

SECONDS = {"pair": 0.02, "step": 0.6, "image": 0.065, "judgement": 0.005, "start": 6.0}
"""CPU seconds on one core of a two-core cloud machine (AMD EPYC); used until a unit of this folder
has been timed."""
IMAGES, NUM_ROUNDS = 3, 3
"""Images a prompt of generated pairs, which form as many pairs (`experiment=miniature_own`), and
rounds with prompts of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole comparison."""

    study: Study
    folder: Path
    arms: tuple[Arm, ...]
    """Of the study, those to run."""
    seeds: int
    """Trainings of each arm."""
    steps: int
    """Of a round."""
    prompts: int
    """Held-out prompts."""
    pairs: int
    """Of a round."""
    grid: Grid | None = None
    """That of the study, perhaps a smaller one."""
    extra: tuple[str, ...] = ()
    """Further settings of every run; they override all others."""

    def check(self) -> None:
        """Refuse a number of pairs that cannot be generated.

        Raises:
            ValueError: Names what is allowed.
        """
        most = len(prompts("train")) // NUM_ROUNDS * IMAGES
        generated = any(arm.pairs is None or arm.pairs.is_generated for arm in self.arms)
        if generated and not (IMAGES <= self.pairs <= most and self.pairs % IMAGES == 0):
            raise ValueError(
                f"--pairs {self.pairs}: {IMAGES} images of a prompt form {IMAGES} pairs, and there "
                f"are prompts for {most} pairs a round; give a multiple of {IMAGES} up to that"
            )

    @property
    def common(self) -> list[str]:
        """The settings that every run shares."""
        return [
            f"experiment={self.study.experiment}",
            f"runs={self.folder}",
            f"train.steps={self.steps}",
            "train.keep=1",
            "train.checkpoint_every=25",
            "train.log_every=5",
            f"evaluate.prompts.max_prompts={self.prompts}",
            *LATENTS,
            *self.study.settings,
        ]

    def fill(self, settings: Iterable[str], seed: int = 0) -> list[str]:
        """Settings with the plan's values in place of names in braces."""
        values = {
            "seed": seed,
            "folder": self.folder,
            "pairs": self.pairs,
            "prompts": self.pairs // IMAGES,
            "prompts_x2": self.pairs // IMAGES * 2,
            "prompts_x3": self.pairs // IMAGES * NUM_ROUNDS,
        }
        return [text.format(**values) for text in settings]

    def units(self) -> Iterator["Unit"]:
        """The base, then seed after seed, so that finished arms can be compared early.

        With a grid, seed 0 trains every arm with every beta, and the arm itself has the beta that
        was chosen.
        """
        yield Unit(None, 0)
        for beta in self.grid.betas if self.grid else ():
            for arm in self.arms:
                yield Unit(arm.at(beta), 0)
        for seed in self.training_seeds:
            for arm in self.arms:
                yield Unit(arm, seed)

    @property
    def training_seeds(self) -> range:
        """Seeds of the trainings that are compared; nothing was chosen by them."""
        first = self.study.first_seed
        return range(first, first + self.seeds)

    def pair_sets(self) -> list[PairSet]:
        """The shared pair sets of the arms."""
        return list(dict.fromkeys(arm.pairs for arm in self.arms if arm.pairs))

    def pairs_job(self, pairs: PairSet, arm: Arm, seed: int) -> Job:
        """The run of a shared pair set, with an arm's vote."""
        settings = self.fill([*pairs.settings, *arm.overrides], seed)
        own = [f"seed={seed}", f"run={pairs.name}"]
        return composed([*self.common, *settings, *own, *self.extra])

    def unit_job(self, unit: "Unit") -> Job:
        """The training of an arm, in a run folder of its own."""
        arm = unit.arm
        assert arm is not None
        settings = [*(arm.pairs.settings if arm.pairs else ()), *arm.overrides]
        own = [f"seed={unit.seed}", f"run={unit.name}"]
        if arm.rounds > 1:
            own.append(f"train.steps={self.steps * arm.rounds}")
        if arm.before:
            policy = self.folder / f"{arm.before}-{unit.seed}" / "train" / "pipeline"
            own += [f"model.path={policy}", "model.revision=null"]
        return composed([*self.common, *self.fill(settings, unit.seed), *own, *self.extra])

    def labels(self, arm: Arm) -> Path:
        """The folder of an arm's labels, those of the first seed."""
        unit = Unit(arm, 0)
        run = arm.pairs.name if arm.pairs else unit.name
        return self.folder / run / "labels" / self.unit_job(unit).vote.name

    def judge_job(self, where: str = JUDGE) -> Job:
        """Sampling and judging; the initial noise is the same for every arm and training seed."""
        prompts: tuple[str, ...] = ()
        if where == VALIDATION and self.grid:
            number = f"evaluate.prompts.max_prompts={self.grid.prompts}"
            prompts = ("prompts=miniature_validation", number)
        return _composed((*self.common, *prompts, "seed=0", f"run={where}", *self.extra))


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
    trained = [each for each in plan.units() if each.arm and each.name in known]
    if unit.arm is None or not trained:
        return typical(plan, unit)
    measured = sum(known[each.name] for each in trained)
    return typical(plan, unit) * measured / sum(typical(plan, each) for each in trained)


def typical(plan: Plan, unit: Unit) -> float:
    """CPU seconds of a unit on the machine of `SECONDS`."""
    prompts = plan.grid.prompts if plan.grid and unit.arm and unit.seed == 0 else plan.prompts
    seconds = prompts * (SECONDS["image"] + SECONDS["judgement"])
    if unit.arm:
        seconds += plan.steps * unit.arm.rounds * SECONDS["step"] + SECONDS["start"]
        if not unit.arm.pairs:
            seconds += plan.pairs * (SECONDS["image"] + SECONDS["pair"])
    return seconds * plan.study.cost


def of_pairs(plan: Plan, pairs: PairSet) -> float:
    """CPU seconds of generating and labelling a shared pair set."""
    number = plan.pairs * max(arm.rounds for arm in plan.arms if arm.pairs == pairs)
    return number * (SECONDS["pair"] + pairs.is_generated * SECONDS["image"])


def estimate(plan: Plan, done: set[str], jobs: int) -> float:
    """Seconds that are left with `jobs` processes."""
    known = measured(plan)
    left = sum(expected(plan, unit, known) for unit in plan.units() if unit.name not in done)
    for pairs in plan.pair_sets():
        if pairs.name not in done and not (plan.folder / pairs.name / "labels").exists():
            left += of_pairs(plan, pairs)
    return left / jobs
