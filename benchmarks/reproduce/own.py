"""The study of own pairs: against given pairs, in rounds, and with other votes.

All arms have BalancedDPO's reference, snapshots every 50 steps. The base generates its pairs for
all arms and training seeds together; later rounds generate with the policy of their training seed.
"""

from pathlib import Path

from benchmarks.reproduce.study import Arm, PairSet, Study

PAIRS, VOTE, ROUNDS = "pairs", "vote", "rounds"
"""What an arm varies."""


def _generated(name: str, prompts: str) -> PairSet:
    """Pairs by the base for so many prompts, from the first on."""
    root = f"pairs.root={{folder}}/{name}/pairs"
    return PairSet(name, (root, f"generate.prompts.max_prompts={prompts}"), is_generated=True)


GIVEN = PairSet("given", ("pairs=miniature", "pairs.options.num_pairs={pairs}"))
FIRST = _generated("first", "{prompts}")
WHOLE = _generated("whole", "{prompts_x3}")


def _round(number: int, before: str, prompts: str) -> Arm:
    """A round that trains the policy of another arm further, on images of that policy."""
    settings = (
        "generate.prompts.max_prompts={prompts}",
        f"generate.prompts.skip_prompts={prompts}",
    )
    return Arm(f"round_{number}", f"round {number}", ROUNDS, settings, before=before)


ARMS = (
    Arm("given", "given pairs", PAIRS, (), GIVEN),
    Arm("own", "own pairs (round 1)", PAIRS, (), FIRST),
    _round(2, "own", "{prompts}"),
    _round(3, "round_2", "{prompts_x2}"),
    Arm("long", "one long round", ROUNDS, (), WHOLE, rounds=3),
    Arm("unanimous", "own pairs, unanimous vote", VOTE, ("vote=unanimous",), FIRST),
    Arm("extremes", "own pairs, extremes", VOTE, ("vote=extremes",), FIRST),
)
CLAIMS = {
    "Own pairs are better than as many given ones": ("own", ("given",)),
    "Three rounds are better than one long round": ("round_3", ("long",)),
    "Round 2 is better than round 1": ("round_2", ("own",)),
    "Round 3 is better than round 2": ("round_3", ("round_2",)),
    "A long round is better than a short one": ("long", ("own",)),
    "Three rounds are better than one with given pairs": ("round_3", ("given",)),
    "The majority is better than unanimity": ("own", ("unanimous",)),
    "All pairs are better than the extremes": ("own", ("extremes",)),
}

STUDY = Study(
    name="own",
    experiment="miniature_own",
    arms=ARMS,
    claims=CLAIMS,
    pairs=2400,
    folder=Path("runs/reproduce-own"),
    mark="own pairs",
    figures="own-pairs",
    quick_arms=("own", "round_2"),
    quick_pairs=18,
)
