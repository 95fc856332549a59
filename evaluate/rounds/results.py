"""What came of a round, read from what its stages wrote; needs no model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data.artifacts.manifest import read_manifest
from data.artifacts.schemas import Role
from evaluate.reporting.label_facts import label_facts
from evaluate.reporting.summary import as_json
from evaluate.rounds.plan import RoundsPlan, name_of
from evaluate.statistics.winrate import Judge, Verdict, compare


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """A finished round."""

    number: int
    folder: Path
    """The folder of its comparison."""
    prompts: Mapping[str, Any]
    """The prompts that it was judged on."""
    against_base: Mapping[str, Any]
    """The comparison of its model with the base, as in `winrates.json`."""
    against_previous: Mapping[str, Any] | None
    """The same with the round before; None for round 1, where that is the base."""
    labels: Mapping[str, Any]
    """`label_clarity` of its label set."""

    @property
    def name(self) -> str:
        """The name of its model."""
        return name_of(self.number)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "round": self.number,
            "folder": str(self.folder),
            "prompts": dict(self.prompts),
            "labels": dict(self.labels),
            "against_base": self.against_base,
            "against_previous": self.against_previous,
        }


def read_result(plan: RoundsPlan, number: int) -> RoundResult:
    """Read a finished round.

    The comparison with the round before is computed from the scores of the round's images: both
    models' images are among them.
    """
    round_folder = plan.round_folder(number)
    folder = round_folder / plan.judged
    summary = json.loads((folder / "winrates.json").read_text())
    name = name_of(number)
    by_model = {comparison["model"]: comparison for comparison in summary["comparisons"]}
    previous = None
    if number > 1:
        settings = summary["settings"]
        judges = [
            Judge(metric, Role(judge["role"]), judge["tie"])
            for metric, judge in settings["judges"].items()
        ]
        scores = pl.read_parquet(folder / "scores.parquet")
        previous = as_json(
            compare(
                scores, judges, name_of(number - 1), name,
                resamples=settings["resamples"], seed=settings["seed"],
            )
        )  # fmt: skip
    return RoundResult(
        number=number,
        folder=folder,
        prompts=summary["prompts"],
        against_base=by_model[name],
        against_previous=previous,
        labels=label_clarity(round_folder / "labels" / plan.vote),
    )


def label_clarity(folder: Path) -> dict[str, Any]:
    """How clear a label set is: pairs, ties, leads in votes, and how often its voters agree.

    `tied` is the fraction of scored pairs with as many votes for one image as for the other,
    `margin` the winners' mean lead in votes, `agreement` the mean fraction of equal votes of each
    two metrics, None for a single one.
    """
    facts, manifest = label_facts(folder), read_manifest(folder, "labels")
    assert facts is not None
    assert manifest is not None
    columns = ["status", "votes_0", "votes_1", "winner", "margin"]
    frame = pl.read_parquet([folder / file.name for file in manifest.files], columns=columns)
    scored = frame.filter(pl.col("status") == "ok")
    even = scored.select((pl.col("votes_0") == pl.col("votes_1")).mean()).item()
    lead = scored.filter(pl.col("winner").is_not_null())["margin"].mean()
    metrics = [n for n, voter in enumerate(facts["voters"]) if voter != "human"]
    matrix = np.array(facts["agreement"], dtype=float)[np.ix_(metrics, metrics)]
    apart = matrix[~np.eye(len(metrics), dtype=bool)]
    return {
        "pairs": facts["pairs"],
        "decided": facts["decided"],
        "outcomes": facts["outcomes"],
        "tied": even,
        "margin": lead,
        "agreement": float(np.nanmean(apart)) if np.isfinite(apart).any() else None,
        "identity": facts["identity"],
    }


def reason_to_stop(result: RoundResult) -> str:
    """Why the rounds should end with this one: a held-out judge shows it to be worse; or ""."""
    compared = [result.against_previous, result.against_base]  # the nearer one first
    for comparison in filter(None, compared):
        for rate in comparison["rates"]:
            if rate["role"] == Role.HELD_OUT and rate["verdict"] == Verdict.WORSE:
                estimate = rate["win_rate"]
                return (
                    f"{rate['metric']}, a held-out judge, says that {comparison['model']} is worse "
                    f"than {comparison['base']}: it wins {estimate['value']:.1%} "
                    f"({estimate['low']:.1%} to {estimate['high']:.1%})"
                )
    return ""


def images_by_round(
    results: Sequence[RoundResult], base: str, number: int, seed: int
) -> list[tuple[str, list[tuple[str, Path]]]]:
    """Some prompts, drawn at random, each with the image of the base and of every round's model."""
    shown = [(base, results[0]), *((result.name, result) for result in results)]
    tables = [_paths(result.folder, model) for model, result in shown]
    common = tables[0].select("prompt_id", "seed", "prompt")
    for table in tables[1:]:
        common = common.join(table, on=["prompt_id", "seed"], how="semi")
    order = np.random.default_rng(seed).permutation(len(common))[:number]
    rows = []
    for prompt_id, image_seed, prompt in common[np.sort(order)].iter_rows():
        here = (pl.col("prompt_id") == prompt_id) & (pl.col("seed") == image_seed)
        images = [
            (model, result.folder / table.filter(here)["path"].item())
            for (model, result), table in zip(shown, tables, strict=True)
        ]
        rows.append((prompt, images))
    return rows


def _paths(folder: Path, model: str) -> pl.DataFrame:
    columns = ["prompt_id", "seed", "prompt", "path", "model"]
    scores = pl.read_parquet(folder / "scores.parquet", columns=columns)
    return scores.filter(pl.col("model") == model).drop("model").sort("prompt_id", "seed")
