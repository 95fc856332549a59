"""Label your own pairs: a folder of images, and a CSV or JSON Lines file that names them.

    .venv/bin/python -m examples.label_pairs --table pairs.csv --images images

The table has the columns `prompt`, `image_0` and `image_1` (paths below the image folder) and may
have `human`: 1 where people preferred image 0, 0 for image 1, 0.5 for a tie. Without arguments the
script draws a few images itself and labels those. The miniature's scorers need no download; for
photographs add `panel=paper`, which fetches the published ones.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import polars as pl

from conf.job import composed
from data.images import encode_png
from data.miniature import scenes
from label.run import main as label

RUN = Path("runs/example")


def draw_example(folder: Path, num_pairs: int = 60) -> Path:
    """Write two images for each of `num_pairs` prompts and a CSV that lists them."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    table = folder / "pairs.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "image_0", "image_1"])
        for number, prompt in enumerate(scenes.prompts("train")[:num_pairs]):
            names = [f"{number}-{side}.png" for side in (0, 1)]
            for name in names:
                (images / name).write_bytes(encode_png(scenes.imagine(prompt, rng).pixels))
            writer.writerow([prompt, *names])
    return table


def as_parquet(table: Path, folder: Path) -> bool:
    """Convert the table once, because Parquet can be read row by row; True if people chose, too."""
    rows = pl.read_csv(table) if table.suffix == ".csv" else pl.read_ndjson(table)
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_parquet(folder / "pairs.parquet")
    return "human" in rows.columns


def main() -> None:
    """Label the pairs, then show what the scorers decided."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN, help="folder that the run writes to")
    parser.add_argument("--table", type=Path, help="CSV or JSON Lines file with one pair a row")
    parser.add_argument("--images", type=Path, help="folder that the image paths start from")
    parser.add_argument("settings", nargs="*", help="more settings, such as panel=paper")
    given = parser.parse_args()

    # 1. The pairs: a table of image paths.
    table = given.table or draw_example(given.run / "input")
    images = given.images or table.parent / "images"
    has_human = as_parquet(table, given.run / "pairs")

    # 2. Score every image with every metric, vote, and write the label set. If interrupted, run the
    #    same command again; finished score files are reused.
    job = composed([
        f"run={given.run.name}",
        f"runs={given.run.parent}",
        "pairs=parquet",
        f"pairs.root={given.run / 'pairs'}",
        "pairs.images=paths",
        f"pairs.image_root={images}",
        *(["pairs.columns.human=human"] if has_human else []),
        *given.settings,
    ])  # fmt: skip
    label(job)

    # 3. The labels: one row a pair, also for pairs that could not be scored.
    labels = pl.read_parquet(given.run / "labels" / job.vote.name / "part-*.parquet")
    print(labels["decided_by"].value_counts(sort=True))
    print(labels.select("prompt", "^vote_.*$", "winner", "margin").head(5))


if __name__ == "__main__":
    main()
