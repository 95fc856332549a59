"""How fast pairs are generated, beside the bare pipeline: `make bench-pairs`.

Prints a table and, on the last line, its figures as one JSON object. The bare pipeline of diffusers
makes as many images in the same batches, with the same steps and guidance, and throws them away; we
encode and write them, and the files of pairs, too. Both take turns, and the middle of the ratios
counts. Then: the peak memory of a process as the prompts grow tenfold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.label import machine, table
from data.devices import Dtype, choose_device
from data.distributed import Rank
from data.images import Size
from data.miniature import scenes
from generate.config import GenerateSpec, ImageFormat
from generate.image_files import Model
from generate.pair_set.image_maker import ImageMaker, generate_block, generate_blocks
from generate.pair_set.plan import PairPlan
from generate.pair_set.shard_writer import write_shard
from generate.pipelines import load_pipeline
from generate.prompts.files import Prompt
from generate.prompts.prompt_set import PromptSet

MODEL = "data/miniature/weights/base"
SHARD_PROMPTS, IMAGES = 16, 4


def plan_of(folder: Path, num_prompts: int, given: argparse.Namespace, **settings: Any) -> PairPlan:
    """A pair set of the first prompts of the embedded world."""
    texts = scenes.prompts("train")
    prompts = tuple(Prompt(i, f"{texts[i % len(texts)]} {i}") for i in range(num_prompts))
    spec = {
        "images": IMAGES, "steps": given.steps, "guidance": given.guidance, "batch": given.batch,
        "dtype": Dtype(given.dtype), "format": ImageFormat(given.format),
        "shard_prompts": SHARD_PROMPTS,
    }  # fmt: skip
    return PairPlan(
        folder=folder,
        spec=GenerateSpec(**(spec | settings)),
        models=(Model(name="base", path=given.model, revision=given.revision),),
        prompts=PromptSet("bench", prompts, empty=0, repeated=0),
        size=Size(given.resolution, given.resolution),
        seed=0,
    )


# --- speed ---------------------------------------------------------------------------------------


def speed(given: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both, in turns, and the middle of their ratios."""
    with tempfile.TemporaryDirectory() as root:
        first = plan_of(Path(root) / "first", given.prompts, given)
        maker = ImageMaker.load(first, first.models[0], Rank())
        pipeline = load_pipeline(first.models[0], first.spec.dtype)
        pipeline.scheduler = maker.generator.pipeline.scheduler
        pipeline.to(choose_device("device", "auto", Rank()))
        pipeline.set_progress_bar_config(disable=True)
        bare(pipeline, first, most=1)  # neither pays for what happens once
        warm = plan_of(Path(root) / "warm", 1, given)
        ours(maker, warm)
        turns = [
            {
                "bare": first.num_images / bare(pipeline, first),
                "ours": first.num_images / ours(maker, plan_of(Path(root) / str(turn),
                                                               given.prompts, given)),
            }
            for turn in range(given.rounds)
        ]  # fmt: skip
    ratios = sorted(turn["ours"] / turn["bare"] for turn in turns)
    return {
        "images": first.num_images,
        "bare": statistics.median(turn["bare"] for turn in turns),
        "ours": statistics.median(turn["ours"] for turn in turns),
        "ratio": statistics.median(ratios),
        "ratio_lowest": ratios[0],
        "ratio_highest": ratios[-1],
    }


def bare(pipeline: Any, plan: PairPlan, most: int | None = None) -> float:
    """Seconds of the pipeline alone for the batches of a plan."""
    since = time.perf_counter()
    for block in range(plan.num_blocks):
        for batch in list(plan.batches(block, "base"))[:most]:
            pipeline(
                prompt=[image.prompt.text for image in batch],
                num_inference_steps=batch[0].steps,
                guidance_scale=batch[0].guidance,
                height=plan.size.height,
                width=plan.size.width,
                output_type="pil",
            )
        if most:
            break
    return time.perf_counter() - since


def ours(maker: ImageMaker, plan: PairPlan) -> float:
    """Seconds until all files of pairs are on disk, with a model that is loaded already."""
    since = time.perf_counter()
    for block in range(plan.num_blocks):
        generate_block(plan, block, plan.models[0], lambda: maker)
        write_shard(plan, block)
    return time.perf_counter() - since


# --- memory --------------------------------------------------------------------------------------


def memory(num_prompts: int, arguments: list[str]) -> float:
    """Peak MiB of a process that generates pairs of so many prompts."""
    program = [sys.executable, "-m", "benchmarks.pairs", *arguments, f"--memory={num_prompts}"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_here(num_prompts: int, given: argparse.Namespace) -> None:
    """Generate in this process, one step an image, and print its peak."""
    with tempfile.TemporaryDirectory() as root:
        plan = plan_of(Path(root), num_prompts, given, images=2, steps=1, guidance=1.0)
        generate_blocks(plan, range(plan.num_blocks), Rank())
    said = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
    print(int(said.partition("VmHWM:")[2].split()[0]) / 1024)


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="small inputs: does it run at all?")
    arguments.add_argument("--model", default=MODEL, help="a diffusers folder, or a hub id")
    arguments.add_argument("--revision", help="the hub's commit")
    arguments.add_argument("--resolution", type=int, default=64, help="pixels")
    arguments.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    arguments.add_argument("--format", default="png", help="png, webp or jpeg")
    arguments.add_argument("--steps", type=int, default=15, help="denoising steps")
    arguments.add_argument("--guidance", type=float, default=1.5, help="guidance scale")
    arguments.add_argument("--batch", type=int, default=16, help="images sampled together")
    arguments.add_argument("--prompts", type=int, default=32, help="prompts of four images each")
    arguments.add_argument("--rounds", type=int, default=3, help="turns of what is compared")
    arguments.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.quick:
        given.prompts, given.steps, given.rounds, given.batch = 2, 2, 1, 4
    if given.memory:
        memory_here(given.memory, given)
        return
    result: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[1]}
    table(result)
    result["images_per_s"] = speed(given)
    table({"images_per_s": result["images_per_s"]})
    if not given.quick:
        sizes = (given.prompts, 10 * given.prompts)
        result["peak_memory_mib"] = {f"{n}_prompts": memory(n, sys.argv[1:]) for n in sizes}
        table({"peak_memory_mib": result["peak_memory_mib"]})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
