"""The second study: every arm at its own best beta, five seeds, at equal steps and equal distance.

Votes, each under a frozen and under a moving reference, and objectives under majority labels. "At
least three of four" is no arm: with four voters of which none abstains, it is the majority.
"""

from enum import StrEnum
from pathlib import Path

from benchmarks.reproduce.paper import SHARED, VOTERS
from benchmarks.reproduce.study import Arm, Grid, Study

K = 15
"""Optimizer steps between two snapshots: a quarter of the steps, as in the first study."""
ANCHOR = 0.25
"""Winners weigh one and a half times as much as losers at first."""
REFERENCES = {
    "frozen": ("reference=frozen",),
    "moving": ("reference=snapshot", f"train.reference.every={K}"),
}
VOTES = {
    "human": ("human labels", ("vote=human",)),
    **{f"single_{m}": (f"{m} alone", ("vote=single", f"vote.metric={m}")) for m in VOTERS},
    "sum": ("sum of scores", ("vote=sum",)),
    "zscore_sum": ("sum of z-scores", ("vote=zscore_sum",)),
    "majority": ("majority", ("vote=majority",)),
    "unanimous": ("unanimity", ("vote=unanimous",)),
    "smoothed": (
        "majority, smoothed by votes", ("vote=majority", "train.objective.vote_smoothing=true"),
    ),
    "weighted": ("majority, weighted by lead", ("vote=majority", "objective=margin_dpo")),
}  # fmt: skip
"""Name -> title and settings."""
OBJECTIVES = {
    "sdpo": ("majority, sdpo", ("vote=majority", "objective=sdpo")),
    "linear": ("majority, Linear-DPO", ("vote=majority", "objective=linear_dpo")),
    "anchor": (
        "majority, winner anchor", ("vote=majority", f"train.objective.anchor={ANCHOR}"),
    ),
}  # fmt: skip


class Group(StrEnum):
    """What an arm varies; arms of a group have the same colour."""

    FROZEN = "frozen"
    MOVING = "moving"


def _arm(name: str, reference: str) -> Arm:
    title, settings = (VOTES | OBJECTIVES)[name]
    overrides = (*settings, *REFERENCES[reference])
    return Arm(f"{name}_{reference}", f"{title}, {reference}", Group(reference), overrides, SHARED)


ARMS = tuple(_arm(name, reference) for reference in REFERENCES for name in VOTES | OBJECTIVES)


def _each(claim: str, name: str, others: tuple[str, ...]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The same claim under either reference."""
    return {
        f"{claim}, {reference}": (
            f"{name}_{reference}", tuple(f"{other}_{reference}" for other in others),
        )
        for reference in REFERENCES
    }  # fmt: skip


CLAIMS = {
    **_each("The majority is better than each single metric", "majority",
            tuple(f"single_{metric}" for metric in VOTERS)),
    **_each("The majority is better than mixing scores", "majority", ("sum", "zscore_sum")),
    **_each("The majority is better than human labels", "majority", ("human",)),
    **_each("The majority is better than unanimity", "majority", ("unanimous",)),
    **_each("Smoothing by votes is better than none", "smoothed", ("majority",)),
    **_each("Weighting by lead is better than not", "weighted", ("majority",)),
    **_each("sdpo is better than dpo", "sdpo", ("majority",)),
    **_each("Linear-DPO is better than dpo", "linear", ("majority",)),
    **_each("A winner anchor is better than none", "anchor", ("majority",)),
    "A moving reference is better than a frozen one, majority": (
        "majority_moving", ("majority_frozen",),
    ),
    "A moving reference is better than a frozen one, unanimity": (
        "unanimous_moving", ("unanimous_frozen",),
    ),
}  # fmt: skip

STUDY = Study(
    name="own_beta",
    experiment="miniature",
    settings=(
        "train.batch=16", "train.micro_batch=16", "train.lr=7.0e-5", "train.warmup=6",
        "train.checkpoint_every=1000", "evaluate.steps=10", "evaluate.distance_images=24",
    ),
    grid=Grid(
        betas=(500.0, 1500.0, 5000.0, 15000.0),
        prompts=100,
        shown=frozenset({"majority_frozen", "majority_moving", "unanimous_frozen",
                         "unanimous_moving", "anchor_moving", "sdpo_moving"}),
        quick_betas=(1500.0, 5000.0),
    ),
    arms=ARMS,
    claims=CLAIMS,
    pairs=3000,
    seeds=5,
    first_seed=1,
    steps=60,
    prompts=150,
    folder=Path("runs/reproduce-own-beta"),
    page=Path("docs/own-beta.md"),
    mark="own beta",
    figures="own-beta",
    quick_arms=("majority_frozen", "majority_moving"),
    quick_pairs=160,
)  # fmt: skip
