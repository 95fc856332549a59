"""The comparison's tables: Markdown for people, rows for programs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.reproduce.results import Contrast
from benchmarks.reproduce.study import Arm, Study
from evaluate.statistics.bootstrap import Estimate
from evaluate.statistics.winrate import Judge

MARKS = {"better": "", "worse": " ▼", "not shown": " ·"}
"""The mark after a win rate, by its verdict."""


def against_base(
    contrasts: Mapping[str, Contrast],
    arms: Sequence[Arm],
    judges: Sequence[Judge],
    pairs: Mapping[str, int],
) -> str:
    """Every arm against the base, with a row per arm and a column per judge.

    `pairs` maps an arm to the number of pairs with a winner.
    """
    names = [judge.metric.replace("_", " ") for judge in judges]
    head = [
        "arm",
        "pairs",
        "voters' average",
        "over seeds",
        "gain",
        *names,
        "weakest voter",
        "all voters better",
    ]
    rows = []
    for arm in arms:
        if arm.name not in contrasts:
            continue
        contrast = contrasts[arm.name]
        low, high, _ = contrast.spread()
        rates = [
            f"{percent(rate.win_rate.value)}{MARKS[rate.verdict]}"
            for rate in contrast.comparison.rates
        ]
        weakest = f"{percent(contrast.weakest.win_rate.value)} {contrast.weakest.metric}"
        dominance = percent(contrast.comparison.joint_dominance.value)
        over = f"{percent(low)} to {percent(high)}"
        known = str(pairs.get(arm.name, "–"))
        gain = f"{contrast.gain:+.2f}"
        rows.append(
            [arm.title, known, span(contrast.average), over, gain, *rates, weakest, dominance]
        )
    return markdown(head, rows)


def claims(contrasts: Mapping[tuple[str, str], Contrast], study: Study) -> str:
    """The study's claims, arm against arm, and whether they hold here."""
    titles = {arm.name: arm.title for arm in study.arms}
    head = ["claim", "against", "voters' average", "over seeds", "judges better / worse", "it"]
    rows = []
    for claim, (arm, others) in study.claims.items():
        for other in others:
            if contrast := contrasts.get((arm, other)):
                low, high, _ = contrast.spread()
                better, worse = contrast.verdicts
                over, count = f"{percent(low)} to {percent(high)}", f"{better} / {worse}"
                rows.append(
                    [claim, titles[other], span(contrast.average), over, count, contrast.conclusion]
                )
    return markdown(head, rows)


def steadiness(contrasts: Mapping[str, Contrast], arms: Sequence[Arm]) -> str:
    """How much the results of these arms vary over training seeds."""
    shown = [arm for arm in arms if arm.name in contrasts]
    judges = [r.metric for arm in shown[:1] for r in contrasts[arm.name].others]
    head = ["arm", "voters' average", "deviation", *(
        word for metric in judges for word in (metric.replace("_", " "), "deviation")
    )]  # fmt: skip
    rows = []
    for arm in shown:
        contrast = contrasts[arm.name]
        row = [arm.title, span(contrast.average), percent(contrast.spread()[2])]
        for metric in judges:
            row += [
                percent(contrast.rate(metric).win_rate.value),
                percent(contrast.spread(metric)[2]),
            ]
        rows.append(row)
    return markdown(head, rows)


def short(contrasts: Mapping[str, Contrast], arms: Sequence[Arm]) -> Table:
    """The first table for a terminal: average, weakest voter, and the judges without a vote."""
    table = Table(title="Win rates against the base, %", title_justify="left")
    for name in ("arm", "voters' average", "weakest voter", "others"):
        table.add_column(name)
    for arm in arms:
        if contrast := contrasts.get(arm.name):
            weakest, others = contrast.weakest, contrast.others
            table.add_row(
                arm.title,
                span(contrast.average),
                f"{percent(weakest.win_rate.value)} {weakest.metric}",
                ", ".join(f"{r.metric} {percent(r.win_rate.value)}" for r in others),
            )
    return table


def rows(contrasts: Iterable[Contrast]) -> list[dict[str, Any]]:
    """A flat row for each contrast and judge, with `average` as one of the judges."""
    flat = []
    for contrast in contrasts:
        shared = {"arm": contrast.arm, "against": contrast.against, "seeds": len(contrast.by_seed)}
        flat += [
            shared
            | _numbers(rate.metric, rate.win_rate, contrast)
            | {"role": rate.role.value, "verdict": rate.verdict.value, "prompts": rate.prompts}
            | {"p_value": rate.p_value, "change": rate.change.value / (rate.std_base or 1.0)}
            for rate in contrast.comparison.rates
        ]
        flat.append(shared | _numbers("average", contrast.average, contrast) | {"role": "average"})
    return flat


def _numbers(metric: str, estimate: Estimate, contrast: Contrast) -> dict[str, Any]:
    low, high, deviation = contrast.spread(metric)
    return {
        "metric": metric,
        "win_rate": estimate.value,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "seed_low": low,
        "seed_high": high,
        "seed_deviation": None if deviation != deviation else deviation,
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(estimate: Estimate) -> str:
    """A rate in % with its 95 % interval."""
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def percent(value: float) -> str:
    """A rate in %, with one digit; a dash for NaN, the deviation of a single seed."""
    return "–" if value != value else f"{100 * value:.1f}"
