"""`python -m label.parity`: published scores against ours, and accuracy on the run's pairs.

Missing weights, images and scores of the run are named and skipped. The exit status
is 1 when a score differs from the published one, or when there was nothing to compare.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from conf.job import Job, entry
from data.artifacts.manifest import Manifest, read_manifest, verify
from data.artifacts.parquet_io import read_table
from data.devices import choose_device
from data.distributed import Rank
from data.storage.paths import user_path
from label.analysis.tables import coefficient, number
from label.metrics.registry import resolve
from label.parity.accuracy import Accuracy, measure
from label.parity.references import Finding, check
from label.scoring.score_sets import FACTS

LOGITS = {"clip": 100.0, "hps": 100.0}
"""Kinds whose score lacks the factor of CLIP's logits; its trained value is 100."""
OWN = {
    "imagereward": "strict",
    "hpdv2": "inversions",
    "pickapic": "thresholded",
    "miniature": "thresholded",
}
"""The figure that the authors of a pair set publish."""


def main(job: Job) -> None:
    """Check and report; exit status 1 on a mismatch, or when there was nothing to compare."""
    console = Console()
    findings = references(job)
    report_references(console, findings)
    accuracies = measured(job)
    report_accuracies(console, job, accuracies)
    compared = [finding for finding in findings if not finding.missing]
    wrong = [finding for finding in compared if not finding.fits]
    if wrong or not (compared or accuracies):
        raise SystemExit(1)


# --- published scores ----------------------------------------------------------------------------


def references(job: Job) -> list[Finding]:
    """Every published score that a metric of this job should reproduce."""
    folder = user_path(job.parity.images, "parity.images") if job.parity.images else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"parity.images={folder}: no such folder")

    def score(name: str, images: Sequence[bytes], prompts: Sequence[str]) -> np.ndarray:
        resolve(name, job.metrics[name])  # missing files are reported before torch is imported
        from label.scoring.panel import Panel

        device = choose_device("label.device", job.label.device, Rank())
        panel = Panel.load({name: job.metrics[name]}, device)
        return panel.score(images, prompts, batch=job.label.batch)[name]

    return check(job.metrics, folder, score)


def report_references(console: Console, findings: Sequence[Finding]) -> None:
    """A line for each, and what is missing."""
    if not findings:
        say(console, "published scores: none is about the metrics of this job")
    for finding in findings:
        name = f"{finding.metric}: {finding.reference.source}"
        if finding.missing:
            say(console, f"not checked  {name}: {finding.missing}")
            continue
        verdict = "equal        " if finding.fits else "DIFFERENT    "
        scores, expected = (
            ", ".join(f"{value:.4f}" for value in values)
            for values in (finding.scores, finding.reference.expected)
        )
        allowed = f"{finding.worst:.2g} away, {finding.reference.tolerance:g} allowed"
        say(console, f"{verdict}{name}: {scores}; published {expected} ({allowed})")


# --- accuracy ------------------------------------------------------------------------------------


def measured(job: Job) -> list[Accuracy]:
    """Every metric of which the run has complete scores, on the pairs that people judged."""
    folder = job.folder / "scores"
    facts = manifest_of(folder, FACTS)
    if facts is None:
        return []
    pairs = read(folder / FACTS, facts, ["pair_id", "prompt", "human"])
    accuracies = []
    for name in job.metrics:
        manifest = manifest_of(folder, name)
        if manifest is not None and manifest.sources == facts.sources:
            scores = read(folder / name, manifest, ["score_0", "score_1"])
            scale = LOGITS.get(manifest.settings["kind"], 1.0)
            judged = pl.concat([pairs, scores], how="horizontal")
            accuracies.append(measure(name, judged, scale, job.parity.threshold))
    return [accuracy for accuracy in accuracies if accuracy.pairs]


def manifest_of(folder: Path, name: str) -> Manifest | None:
    """A set's manifest; None where the set is absent or not complete."""
    return read_manifest(folder / name, name)


def read(folder: Path, manifest: Manifest, columns: list[str]) -> pl.DataFrame:
    """Some columns of a whole set, after its files were verified."""
    verify(folder, manifest)
    tables = [read_table(folder / file.name).select(columns) for file in manifest.files]
    frames = [pl.from_arrow(table.replace_schema_metadata(None)) for table in tables]
    return pl.concat([frame for frame in frames if isinstance(frame, pl.DataFrame)])


def report_accuracies(console: Console, job: Job, accuracies: Sequence[Accuracy]) -> None:
    """A table of the three ways to count, with the pair set's own way marked."""
    if not accuracies:
        say(
            console,
            f"accuracy: no scores of judged pairs in {job.folder}/scores; run `make labels`",
        )
        return
    own = OWN.get(job.pairs.kind, "")
    table = Table(title="How often people agree", title_justify="left")
    table.add_column("metric")
    titles = {
        "pairs": "pairs",
        "ties": "tied",
        "strict": "ImageReward's",
        "inversions": "HPDv2's",
        "thresholded": "Pick-a-Pic's",
    }
    for key, title in titles.items():
        table.add_column(f"{title} *" if key == own else title, justify="right")
    for one in accuracies:
        rates = [coefficient(getattr(one, key)) for key in ("strict", "inversions", "thresholded")]
        table.add_row(one.metric, number(one.pairs), number(one.ties), *rates)
    console.print(table)
    if own:
        say(console, "* as the authors of this pair set count; docs/metrics.md has their figures")


def say(console: Console, line: str) -> None:
    """A line as it is, however narrow the terminal."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    entry(main)()
