"""Tables of a study in which every arm has its own beta."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.reproduce.grid import neighbours
from benchmarks.reproduce.grid_results import Progress
from benchmarks.reproduce.match import AVERAGE, Match
from benchmarks.reproduce.plan import BASE
from benchmarks.reproduce.tables import markdown, percent, span
from data.artifacts.schemas import Role

Matches = Mapping[tuple[str, str], Match]


def betas(progress: Progress) -> str:
    """Every arm's validation win rate and distance at each beta; its own beta is bold."""
    assert progress.plan.grid is not None
    tried = progress.plan.grid.betas
    rows = []
    for arm in progress.arms:
        rates, distances = progress.rates[arm.name], progress.distances[arm.name]
        cells = [f"{percent(rates[beta])} ({percent(distances[beta])})" for beta in tried]
        own = tried.index(progress.betas[arm.name])
        cells[own] = f"**{cells[own]}**"
        rows.append([arm.title, *cells])
    return markdown(["arm", *(f"beta {beta:g}" for beta in tried)], rows)


def against_base(progress: Progress, pairs: Mapping[str, int]) -> str:
    """Every arm with its own beta against the base, on test prompts.

    `pairs` maps an arm to the number of pairs with a winner.
    """
    others = [judge.metric for judge in progress.judges if judge.role is not Role.VOTER]
    head = ["arm", "beta", "pairs", "voters' average", "over seeds", "weakest voter",
            *(name.replace("_", " ") for name in others), "gain", "distance"]  # fmt: skip
    rows = []
    for arm in progress.arms:
        if (each := progress.final.get((arm.name, BASE))) is None:
            continue
        rows.append([
            arm.title,
            f"{progress.betas[arm.name]:g}",
            str(pairs.get(arm.name, "–")),
            span(each.average),
            over_seeds(each),
            f"{percent(each.rates[each.weakest].value)} {each.weakest}",
            *(percent(each.rates[name].value) for name in others),
            f"{each.gain:+.2f}",
            percent(progress.final_distance(arm)),
        ])  # fmt: skip
    return markdown(head, rows)


def claims(progress: Progress) -> str:
    """The study's claims at equal steps and at equal distance."""
    titles = {arm.name: arm.title for arm in progress.plan.arms}
    head = ["claim", "against", "own betas, test prompts", "over seeds", "judges better / worse",
            "it", "distance", "validation prompts at that distance", "one training"]  # fmt: skip
    rows = []
    for claim, (arm, others) in progress.plan.study.claims.items():
        for other in others:
            final, near = (each.get((arm, other)) for each in (progress.final, progress.near))
            if final is None:
                continue
            better, worse = final.verdicts
            row = [claim, titles[other], span(final.average), over_seeds(final),
                   f"{better} / {worse}", final.conclusion]  # fmt: skip
            shared = progress.shared_distance(arm, other)
            far = percent(shared or math.nan)
            row += [far, span(near.average), of_one(near)] if near else ["none", "–", "–"]
            rows.append(row)
    return markdown(head, rows)


def at_equal_distance(progress: Progress) -> str:
    """Every arm against the base at the common distance."""
    others = [judge.metric for judge in progress.judges if judge.role is not Role.VOTER]
    head = ["arm", "between betas", "voters' average", "weakest voter",
            *(name.replace("_", " ") for name in others), "gain"]  # fmt: skip
    rows = []
    for arm in progress.arms:
        distances = progress.distances[arm.name]
        if (each := progress.near.get((arm.name, BASE))) is None:
            rows.append([arm.title, "out of reach", *["–"] * (len(head) - 2)])
            continue
        rows.append([
            arm.title,
            " and ".join(f"{beta:g}" for beta, _ in neighbours(distances, progress.target)),
            span(each.average),
            f"{percent(each.rates[each.weakest].value)} {each.weakest}",
            *(percent(each.rates[name].value) for name in others),
            f"{each.gain:+.2f}",
        ])  # fmt: skip
    return markdown(head, rows)


def of_one(each: Match) -> str:
    """What one training shows, which is nothing about others."""
    words = {"holds": "better", "is contradicted": "worse"}
    return words.get(each.conclusion, "not shown")


def over_seeds(each: Match) -> str:
    """The lowest and the highest rate of a single training."""
    return f"{percent(min(each.by_seed))} to {percent(max(each.by_seed))}"


def rows(matches: Iterable[Match], **facts: Any) -> list[dict[str, Any]]:
    """A flat row for each match and judge, for programs."""
    return [
        {
            **facts,
            "arm": each.arm,
            "against": each.against,
            "metric": name,
            "role": each.roles[name].value if name != AVERAGE else AVERAGE,
            "win_rate": rate.value,
            "ci_low": rate.low,
            "ci_high": rate.high,
            "seeds": len(each.seeds),
            "gain": each.gain,
        }
        for each in matches
        for name, rate in each.rates.items()
    ]
