"""The comparison's tables: Markdown for people, rows for programs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.reproduce.arms import OTHER_K, OURS, VOTERS, Arm
from benchmarks.reproduce.results import Contrast
from evaluate.statistics.bootstrap import Estimate
from evaluate.statistics.winrate import Judge

MARKS = {"better": "", "worse": " ▼", "not shown": " ·"}
"""Behind a win rate: shown to be worse, or nothing shown."""
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
    "A moving reference is better than a frozen one that holds less": (OURS, ("majority_loose",)),
    "K = 50 is better than another K": (OURS, tuple(f"{OURS}_k{k}" for k in OTHER_K)),
    "Snapshots are better than an average": (OURS, ("ema",)),
    "Dropping ties is better than run_identity them": (OURS, ("ties_human", "ties_metric")),
}  # fmt: skip
"""Claim -> the arm that should win, and against whom. The consensus alone is `majority`, whose
reference is frozen like that of the arms it is compared with."""


def against_base(
    found: Mapping[str, Contrast],
    arms: Sequence[Arm],
    judges: Sequence[Judge],
    pairs: Mapping[str, int],
) -> str:
    """Every arm against the base: one row an arm, one column a judge; `pairs` had a winner."""
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
        if arm.name not in found:
            continue
        one = found[arm.name]
        low, high, _ = one.spread()
        rates = [
            f"{percent(rate.win_rate.value)}{MARKS[rate.verdict]}" for rate in one.comparison.rates
        ]
        weakest = f"{percent(one.weakest.win_rate.value)} {one.weakest.metric}"
        dominance = percent(one.comparison.joint_dominance.value)
        over = f"{percent(low)} to {percent(high)}"
        known = str(pairs.get(arm.name, "–"))
        gain = f"{one.gain:+.2f}"
        rows.append([arm.title, known, span(one.average), over, gain, *rates, weakest, dominance])
    return markdown(head, rows)


def claims(found: Mapping[tuple[str, str], Contrast], arms: Sequence[Arm]) -> str:
    """What the paper says, arm against arm, and whether it holds here."""
    titles = {arm.name: arm.title for arm in arms}
    head = ["claim", "against", "voters' average", "over seeds", "judges better / worse", "it"]
    rows = []
    for claim, (arm, others) in CLAIMS.items():
        for other in others:
            if one := found.get((arm, other)):
                low, high, _ = one.spread()
                better, worse = one.verdicts
                over, count = f"{percent(low)} to {percent(high)}", f"{better} / {worse}"
                rows.append([claim, titles[other], span(one.average), over, count, one.held])
    return markdown(head, rows)


def steadiness(found: Mapping[str, Contrast], arms: Sequence[Arm]) -> str:
    """The arms whose labels are the majority's: how far apart their training seeds end."""
    shown = [arm for arm in arms if arm.name in found and arm.is_majority]
    judges = [r.metric for arm in shown[:1] for r in found[arm.name].others]
    head = ["arm", "voters' average", "deviation", *(
        word for metric in judges for word in (metric.replace("_", " "), "deviation")
    )]  # fmt: skip
    rows = []
    for arm in shown:
        one = found[arm.name]
        row = [arm.title, span(one.average), percent(one.spread()[2])]
        for metric in judges:
            row += [percent(one.rate(metric).win_rate.value), percent(one.spread(metric)[2])]
        rows.append(row)
    return markdown(head, rows)


def short(found: Mapping[str, Contrast], arms: Sequence[Arm]) -> Table:
    """The first table for a terminal: average, weakest voter, and the judges that never vote."""
    table = Table(title="Win rates against the base, %", title_justify="left")
    for name in ("arm", "voters' average", "weakest voter", "others"):
        table.add_column(name)
    for arm in arms:
        if one := found.get(arm.name):
            weakest, others = one.weakest, one.others
            table.add_row(
                arm.title,
                span(one.average),
                f"{percent(weakest.win_rate.value)} {weakest.metric}",
                ", ".join(f"{r.metric} {percent(r.win_rate.value)}" for r in others),
            )
    return table


def rows(found: Iterable[Contrast]) -> list[dict[str, Any]]:
    """Every contrast and judge as a flat row, `average` among the judges."""
    flat = []
    for one in found:
        shared = {"arm": one.arm, "against": one.against, "seeds": len(one.by_seed)}
        flat += [
            shared
            | _numbers(rate.metric, rate.win_rate, one)
            | {"role": rate.role.value, "verdict": rate.verdict.value, "prompts": rate.prompts}
            | {"p_value": rate.p_value, "change": rate.change.value / (rate.std_base or 1.0)}
            for rate in one.comparison.rates
        ]
        flat.append(shared | _numbers("average", one.average, one) | {"role": "average"})
    return flat


def _numbers(metric: str, estimate: Estimate, one: Contrast) -> dict[str, Any]:
    low, high, deviation = one.spread(metric)
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
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(estimate: Estimate) -> str:
    """A rate in % with its 95 % interval."""
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def percent(value: float) -> str:
    """A rate in %, one digit; a dash for one seed's deviation."""
    return "–" if value != value else f"{100 * value:.1f}"
