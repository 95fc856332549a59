"""The paper's study: which labels each arm trains on, and how its reference moves.

Arms that are compared differ in one thing: the labels under a frozen reference, the reference
under majority labels, or the tie rule under BalancedDPO's labels and reference.
"""

from enum import StrEnum
from pathlib import Path

from benchmarks.reproduce.study import Arm, PairSet, Study

VOTERS = ("hps", "clip", "pickscore", "aesthetic")
OURS = "balanced"
"""The arm that the paper is about."""
K = 50
"""Optimizer steps between two snapshots, as in `experiment=miniature`."""
OTHER_K = (10, 100)
TIE_METRIC = "pickscore"
LOOSE_BETA = 1250.0
"""A quarter of `experiment=miniature`'s beta: the control for a moving reference, which also lets
the policy move further from the base. Added after the first full run."""


class Group(StrEnum):
    """What an arm varies."""

    LABELS = "labels"
    REFERENCE = "reference"
    TIES = "ties"


SHARED = PairSet("shared", ("pairs.options.num_pairs={pairs}",))


def _labels(name: str, title: str, *vote: str) -> Arm:
    return Arm(name, title, Group.LABELS, (*vote, "reference=frozen"), SHARED)


def _majority(name: str, title: str, *reference: str) -> Arm:
    return Arm(name, title, Group.REFERENCE, ("vote=majority", *reference), SHARED)


def _snapshots(every: int) -> tuple[str, str]:
    return "reference=snapshot", f"train.reference.every={every}"


ARMS = (
    _labels("human", "human labels", "vote=human"),
    *[
        _labels(f"single_{m}", f"{m} alone", "vote=single", f"vote.metric={m}")
        for m in VOTERS
    ],
    _labels("random", "random score", "vote=random", "vote.name=random_{seed}"),
    _labels("sum", "vanilla aggregation", "vote=sum"),
    _labels("zscore_sum", "normalized aggregation", "vote=zscore_sum"),
    _labels("unanimous", "unanimous vote", "vote=unanimous"),
    _labels("majority", "majority, frozen reference", "vote=majority"),
    _majority(OURS, "BalancedDPO", *_snapshots(K)),
    *[
        _majority(f"{OURS}_k{k}", f"majority, snapshots, K = {k}", *_snapshots(k))
        for k in OTHER_K
    ],
    _majority("ema", "majority, EMA reference", "reference=ema"),
    _majority("majority_loose", "majority, frozen, beta / 4", "reference=frozen",
              f"train.beta={LOOSE_BETA}"),
    Arm("ties_human", "BalancedDPO, ties by human", Group.TIES,
        ("vote=majority_human", *_snapshots(K)), SHARED),
    Arm("ties_metric", f"BalancedDPO, ties by {TIE_METRIC}", Group.TIES,
        ("vote=majority", f"vote.name=majority_{TIE_METRIC}", "vote.tie_rule=metric",
         f"vote.tie_metric={TIE_METRIC}", *_snapshots(K)), SHARED),
)  # fmt: skip
"""Every arm; the base, which is not trained, is none."""
CLAIMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "The consensus is better than each single metric": (
        "majority", tuple(f"single_{metric}" for metric in VOTERS),
    ),
    "The consensus is better than mixing scores": ("majority", ("sum", "zscore_sum")),
    "The consensus is better than human labels": ("majority", ("human",)),
    "The majority is better than unanimity": ("majority", ("unanimous",)),
    "The consensus is better than random labels": ("majority", ("random",)),
    "BalancedDPO is better than each single metric": (
        OURS, tuple(f"single_{metric}" for metric in VOTERS),
    ),
    "BalancedDPO is better than mixing scores": (OURS, ("sum", "zscore_sum")),
    "BalancedDPO is better than Diffusion-DPO on human labels": (OURS, ("human",)),
    "A moving reference is better than a frozen one": (OURS, ("majority",)),
    "A moving reference is better than a frozen one with beta / 4": (OURS, ("majority_loose",)),
    "K = 50 is better than another K": (OURS, tuple(f"{OURS}_k{k}" for k in OTHER_K)),
    "Snapshots are better than an average": (OURS, ("ema",)),
    "Dropping ties is better than deciding them": (OURS, ("ties_human", "ties_metric")),
}  # fmt: skip
"""The consensus alone is `majority`, whose reference is frozen like that of the arms it is compared
with."""

STUDY = Study(
    name="paper",
    experiment="miniature",
    arms=ARMS,
    claims=CLAIMS,
    pairs=3000,
    folder=Path("runs/reproduce"),
    mark="results",
    steady=frozenset(a.name for a in ARMS if a.group is not Group.LABELS) | {"majority"},
    quick_arms=("random", OURS),
    quick_pairs=160,
)
