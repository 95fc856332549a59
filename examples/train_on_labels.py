"""Train on labels: Diffusion-DPO on the label set that `examples.label_pairs` wrote.

    .venv/bin/python -m examples.train_on_labels

Trains the miniature Stable Diffusion for a few steps, prints how the loss moved, and generates one
image with the result. For a published model add its settings, for instance
`model=sd15 tuning=lora train.lr=1e-4 train.precision=bf16`.
"""

import argparse
from pathlib import Path

import polars as pl
from diffusers import DiffusionPipeline

from conf.job import composed
from train.run import main as train

RUN = Path("runs/example")


def main() -> None:
    """Train, then look at the metrics log and at an image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN, help="folder that has the labels")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--images", type=Path, help="folder that the image paths start from")
    parser.add_argument("settings", nargs="*", help="more settings, such as tuning=lora")
    given = parser.parse_args()

    # 1. Train. The pair files are named again, because the labels refer to images by file and row.
    #    If interrupted, run the same command again: it resumes from the newest checkpoint.
    job = composed([
        f"run={given.run.name}",
        f"runs={given.run.parent}",
        "pairs=parquet",
        f"pairs.root={given.run / 'pairs'}",
        "pairs.images=paths",
        f"pairs.image_root={given.images or given.run / 'input' / 'images'}",
        f"train.steps={given.steps}",
        "train.batch=8",
        "train.micro_batch=8",
        "train.warmup=2",
        f"train.reference.every={max(1, given.steps // 2)}",
        *given.settings,
    ])  # fmt: skip
    train(job)

    # 2. One line a step. The first loss is ln 2 = 0.6931: policy and reference still agree.
    log = pl.read_ndjson(given.run / "train" / "journal.jsonl")
    print(log.select("step", "loss", "margin", "accuracy"))

    # 3. The result is an ordinary diffusers folder.
    pipeline = DiffusionPipeline.from_pretrained(given.run / "train" / "pipeline")
    prompt = "a small red circle at the left on a blue background"
    image = pipeline(prompt, num_inference_steps=10).images[0]
    image.save(given.run / "image.png")
    print(f"image of {prompt!r}: {given.run / 'image.png'}")


if __name__ == "__main__":
    main()
