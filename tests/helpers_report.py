"""A finished comparison whose every number is known, and its report."""

import numpy as np
import polars as pl
import pyarrow as pa

from data.artifacts import schemas
from data.artifacts.atomic import write_bytes
from data.artifacts.parquet_io import write_table
from data.artifacts.schemas import Role
from data.images import Size, encode_png
from evaluate.config import EvaluateSpec
from evaluate.plan import ComparisonPlan
from evaluate.reporting.report import write_report
from evaluate.reporting.summary import summarise, win_rate_table
from evaluate.statistics.winrate import Judge, compare
from generate.image_files import Model
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet

NUMBER = 30
JUDGES = (Judge("clip_1", Role.VOTER), Judge("hps", Role.VOTER), Judge("truth", Role.ORACLE))
NASTY = '<script>alert("1")</script> & "quotes"'


def finished_comparison(folder):
    """A finished comparison: clip_1 always rises by 1, hps always falls by 1, truth never moves."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(NUMBER):
        level = rng.normal(size=3)
        for name, change in (("base", np.zeros(3)), ("new", np.array([1.0, -1.0, 0.0]))):
            path = f"samples/{name}/{index:05d}-0.png"
            side = 600 if index == 0 else 8  # one too large to be shown as it is
            colour = np.array([index, 10, 200 if name == "new" else 0], np.uint8)
            write_bytes(folder / path, encode_png(np.tile(colour, (side, side, 1))))
            values = level + change
            rows.append(
                {"prompts_name": "set", "prompt_id": index, "prompt": f"{NASTY} {index}", "seed": 0,
                 "model": name, "path": path}
                | {f"score_{j.metric}": v for j, v in zip(JUDGES, values, strict=True)}
            )  # fmt: skip
    schema = schemas.sample_scores([judge.metric for judge in JUDGES])
    scores = pl.from_arrow(pa.Table.from_pylist(rows, schema=schema))
    prompts = tuple(
        Prompt(i, f"{NASTY} {i}", "even" if i % 2 == 0 else "odd", ("few", "some", "many")[i // 10])
        for i in range(NUMBER)
    )
    plan = ComparisonPlan(
        folder=folder,
        spec=EvaluateSpec(resamples=200, gallery_pairs=4),
        models=tuple(Model(name=name, path=f"a/{name}", revision="1") for name in ("base", "new")),
        prompts=PromptSet(name="set", prompts=prompts, empty=0, repeated=1),
        judges=JUDGES,
        metrics={},
        size=Size(64, 64),
        seed=0,
    )  # fmt: skip
    comparison = compare(scores, JUDGES, "base", "new", resamples=200, seed=0)
    summary = summarise(plan, [comparison], scores, {"packages": {"torch": "2"}, "note": NASTY})
    write_table(folder / "winrates.parquet", win_rate_table([comparison], "set"))
    return folder, summary, scores


def write_page(finished, journal=None):
    folder, summary, scores = finished
    write_report(
        folder, summary, scores, journal=journal or folder / "none.jsonl", num_pairs=4, seed=0
    )
    return (folder / "report.html").read_text()
