"""Judge two models: win rates of one diffusers folder against another.

    .venv/bin/python -m examples.judge_models --base /models/sd15 --model /models/mine

Both models generate an image for each prompt from the same initial noise, and every metric scores
both. Without arguments the script compares the model of `examples.train_on_labels` with the
miniature's base. For published models add `panel=paper prompts=lines
evaluate.prompts.path=my_prompts.txt model.resolution=512`.
"""

import argparse
from pathlib import Path

import polars as pl

from conf.job import composed
from evaluate.run import main as evaluate

RUN = Path("runs/example")
BASE = Path("data/miniature/weights/base")


def main() -> None:
    """Compare the models, then read the table that the report is made from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN, help="folder that the run writes to")
    parser.add_argument("--base", type=Path, default=BASE, help="the model to compare with")
    parser.add_argument("--model", type=Path, help="the model to judge")
    parser.add_argument("--prompts", type=int, default=40, help="use this many prompts at most")
    parser.add_argument("settings", nargs="*", help="more settings, such as evaluate.steps=50")
    given = parser.parse_args()

    # 1. Generate, score and compare. If interrupted, run the same command again: images and scores
    #    that are finished are kept.
    job = composed([
        f"run={given.run.name}",
        f"runs={given.run.parent}",
        f"+evaluate.models.base={given.base}",
        f"+evaluate.models.candidate={given.model or given.run / 'train' / 'pipeline'}",
        f"evaluate.prompts.max_prompts={given.prompts}",
        *given.settings,
    ])  # fmt: skip
    evaluate(job)

    # 2. The same numbers as a table. Only an interval that lies above one half shows a gain: 40
    #    prompts show large differences, a few hundred show those that training usually makes.
    rates = pl.read_parquet(given.run / job.evaluate.folder / "winrates.parquet")
    shown = rates.select("metric", "role", "win_rate", "ci_low", "ci_high")
    print(shown.with_columns(better=pl.col("ci_low") > 0.5))


if __name__ == "__main__":
    main()
