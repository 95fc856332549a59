"""The check of `experiment=miniature_best`: against the default, where nothing was chosen.

Its prompts are the test prompts after the 400 of the first study, and no other study has its
training seeds. There is nothing to choose, so it is run once.
"""

from pathlib import Path

from benchmarks.reproduce.paper import SHARED
from benchmarks.reproduce.study import Arm, Study

DEFAULT = Arm(
    "default", "the default (majority, snapshots)", "default",
    ("vote=majority", "reference=snapshot"), SHARED,
)  # fmt: skip
BEST = Arm(
    "best", "miniature_best", "best",
    ("vote=unanimous", "reference=snapshot", "train.beta=1500", "train.objective.anchor=0.25"),
    SHARED,
)  # fmt: skip
"""With the settings of conf/experiment/miniature_best.yaml."""

STUDY = Study(
    name="best",
    experiment="miniature",
    settings=("evaluate.prompts.skip_prompts=400", "train.checkpoint_every=1000"),
    arms=(DEFAULT, BEST),
    claims={"miniature_best is better than the default": ("best", ("default",))},
    pairs=3000,
    seeds=3,
    first_seed=11,
    prompts=217,
    folder=Path("runs/reproduce-best"),
    page=Path("docs/choosing.md"),
    mark="best",
    figures="best",
    steady=frozenset({"default", "best"}),
    quick_arms=("default", "best"),
    quick_pairs=160,
)
