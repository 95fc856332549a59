"""The arms of the comparison: which labels each trains on, and how its reference moves.

Arms that are compared differ in one thing: the labels under a frozen reference, the reference
under majority labels, or the tie rule under BalancedDPO's labels and reference.
"""

from dataclasses import dataclass
from enum import StrEnum

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


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train; all arms start from the same base and have the same budget."""

    name: str
    title: str
    group: Group
    overrides: tuple[str, ...]
    """Settings of the run; `{seed}` stands for the training seed."""

    @property
    def is_majority(self) -> bool:
        """Whether it trains on majority labels, with any reference and any tie rule."""
        return self.group is not Group.LABELS or self.name == "majority"

    def settings(self, seed: int) -> list[str]:
        """The overrides of one training."""
        return [text.format(seed=seed) for text in self.overrides]


def _labels(name: str, title: str, *vote: str) -> Arm:
    return Arm(name, title, Group.LABELS, (*vote, "reference=frozen"))


def _majority(name: str, title: str, *reference: str) -> Arm:
    return Arm(name, title, Group.REFERENCE, ("vote=majority", *reference))


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
        ("vote=majority_human", *_snapshots(K))),
    Arm("ties_metric", f"BalancedDPO, ties by {TIE_METRIC}", Group.TIES,
        ("vote=majority", f"vote.name=majority_{TIE_METRIC}", "vote.tie_rule=metric",
         f"vote.tie_metric={TIE_METRIC}", *_snapshots(K))),
)  # fmt: skip
"""Every arm; the base, which is not trained, is none."""


def named(names: list[str]) -> tuple[Arm, ...]:
    """The arms of these names, in the order of `ARMS`.

    Raises:
        ValueError: There is no such arm.
    """
    known = {arm.name for arm in ARMS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"unknown arm {', '.join(unknown)}; the arms are {', '.join(a.name for a in ARMS)}"
        )
    return tuple(arm for arm in ARMS if arm.name in names)
