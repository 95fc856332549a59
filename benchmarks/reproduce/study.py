"""What a study consists of: pair sets, arms that train on them, and claims about the arms."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PairSet:
    """Pairs that several arms and all training seeds share, in a run that labels them once."""

    name: str
    """The name of its run, and of the piece that does it."""
    settings: tuple[str, ...] = ()
    """Which pairs; braces are filled in by `Plan.fill`."""
    is_generated: bool = False
    """Whether the run generates the pairs before it labels them."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train; all arms start from the same base."""

    name: str
    title: str
    group: str
    """What it varies; arms of a group have the same colour."""
    overrides: tuple[str, ...]
    """Settings of the run; braces are filled in by `Plan.fill`."""
    pairs: PairSet | None = None
    """The pairs to train on; None generates pairs of its own by the policy of `before`."""
    before: str = ""
    """The arm whose policy, of the same training seed, is trained further; empty for the base."""
    rounds: int = 1
    """It trains for so many times the plan's steps."""

    def at(self, beta: float) -> "Arm":
        """The same arm with this beta."""
        settings = (*self.overrides, f"train.beta={beta:g}")
        return replace(self, name=f"{self.name}_b{beta:g}", overrides=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values of beta from which every arm gets its own; `grid.py` has the rule."""

    betas: tuple[float, ...]
    """From the smallest, which leads furthest from the base, to the largest."""
    prompts: int
    """Validation prompts on which beta is chosen."""
    shown: frozenset[str] = frozenset()
    """Arms whose course from beta to beta is drawn."""
    quick_betas: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Arms that are compared with the base and with each other."""

    name: str
    experiment: str
    """Settings that every arm begins with."""
    settings: tuple[str, ...] = ()
    """What every run has beside the experiment."""
    grid: Grid | None = None
    """Where every arm has its own beta; else all have that of their settings."""
    arms: tuple[Arm, ...]
    claims: Mapping[str, tuple[str, tuple[str, ...]]]
    """Claim -> the arm that should win, and the arms it should win against."""
    pairs: int
    """Pairs of a round."""
    seeds: int = 3
    """Trainings of each arm."""
    first_seed: int = 0
    """Of these trainings; a grid chooses with seed 0, which is none of them."""
    steps: int = 200
    """Optimizer steps of a round."""
    prompts: int = 400
    """Held-out prompts."""
    cost: float = 1.0
    """CPU time of its steps and images beside that of the paper's study."""
    folder: Path
    page: Path = Path("docs/reproduction.md")
    """The page that gets the results of all arms and seeds."""
    mark: str
    """The part of the page that gets the results."""
    figures: str = ""
    """Folder of its figures, below the page's."""
    steady: frozenset[str] = frozenset()
    """Arms whose variation over training seeds is compared."""
    quick_arms: tuple[str, ...]
    quick_pairs: int

    def named(self, names: list[str]) -> tuple[Arm, ...]:
        """The arms of these names, in the study's order.

        Raises:
            ValueError: There is no such arm, or one continues an arm that is not named.
        """
        known = {arm.name for arm in self.arms}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"unknown arm {', '.join(unknown)}; the arms are "
                f"{', '.join(arm.name for arm in self.arms)}"
            )
        chosen = tuple(arm for arm in self.arms if arm.name in names)
        for arm in chosen:
            if arm.before and arm.before not in names:
                raise ValueError(f"arm {arm.name} continues {arm.before}; name that arm as well")
        return chosen
