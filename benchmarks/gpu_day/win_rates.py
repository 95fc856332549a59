"""The embedded miniature from labels to win rates on this device, beside the CPU's win rates."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate.run as evaluate_stage
import label.run as label_stage
import train.run as train_stage
from conf.job import composed

ON_CPU = Path("benchmarks/results/miniature-2-core-x86-vm.json")
"""`make eval` on two CPU cores."""
RUN = "miniature"


def measure(folder: Path, *, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the three stages in this process, and compare each judge's win rate with the CPU's."""
    places = [f"runs={folder}", f"run={RUN}", f"pairs.root={folder}/miniature-pairs"]
    job = composed(["experiment=miniature", *places, *overrides])
    warnings.filterwarnings("ignore")
    for stage in (label_stage, train_stage, evaluate_stage):
        stage.main(job)
    summary = json.loads((job.folder / job.evaluate.folder / "winrates.json").read_text())
    (comparison,) = summary["comparisons"]
    rates = {rate["metric"]: rate["win_rate"] for rate in comparison["rates"]}
    known: dict[str, dict[str, float]] = json.loads(ON_CPU.read_text())["win_rates"]
    return {"rows": [row(rates, known)], "win_rates": rates, "on_cpu": known}


def row(
    rates: Mapping[str, Mapping[str, float]], known: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The row in the table: each judge's rate, the CPU's in brackets, and who is outside it."""
    each = [
        f"{name} {rate['value']:.1%} ({known[name]['value']:.1%})" for name, rate in rates.items()
    ]
    outside = [
        name
        for name, rate in rates.items()
        if not known[name]["low"] <= rate["value"] <= known[name]["high"]
    ]
    verdict = "all within the CPU's intervals"
    if outside:
        verdict = f"outside the CPU's interval: {', '.join(outside)}"
    return {"note": f"{', '.join(each)} (on a CPU); {verdict}"}
