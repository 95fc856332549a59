"""The study of a flow-matching model: the paper's main arms on an SD3 of the miniature world.

Pairs, scores and votes are those of the paper's study; base and settings are those of
`experiment=miniature_flow`.
"""

from pathlib import Path

from benchmarks.reproduce.paper import SHARED
from benchmarks.reproduce.study import Arm, Study

OURS = "balanced"
FROZEN, MOVING = "frozen", "snapshots"
LOOSE_BETA = 250.0
"""A quarter of the experiment's beta: the control for a moving reference, which also lets the
policy move further from the base. Added after the first full run."""


def _frozen(name: str, title: str, vote: str, *more: str) -> Arm:
    settings = (f"vote={vote}", "reference=frozen", *more)
    return Arm(name, f"{title}, {FROZEN}", FROZEN, settings, SHARED)


ARMS = (
    _frozen("human", "human labels", "human"),
    _frozen("unanimous", "unanimous vote", "unanimous"),
    _frozen("majority", "majority", "majority"),
    _frozen("majority_loose", "majority, beta / 4", "majority", f"train.beta={LOOSE_BETA}"),
    Arm(OURS, "BalancedDPO", MOVING, ("vote=majority", "reference=snapshot"), SHARED),
)
CLAIMS = {
    "The consensus is better than human labels": ("majority", ("human",)),
    "The majority is better than unanimity": ("majority", ("unanimous",)),
    "BalancedDPO is better than Diffusion-DPO on human labels": (OURS, ("human",)),
    "A moving reference is better than a frozen one": (OURS, ("majority",)),
    "A moving reference is better than a frozen one with beta / 4": (OURS, ("majority_loose",)),
}

STUDY = Study(
    name="flow",
    experiment="miniature_flow",
    arms=ARMS,
    claims=CLAIMS,
    pairs=3000,
    steps=120,
    cost=3.0,
    folder=Path("runs/reproduce-flow"),
    mark="flow",
    figures="flow",
    steady=frozenset({"majority", OURS}),
    quick_arms=("human", OURS),
    quick_pairs=160,
)
