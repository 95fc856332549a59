"""A whole run of stage two: from the labels to the finished pipeline."""

import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from data.shards import code_revision, write_json
from train.adapter import in_diffusers_format
from train.config import Objective, TrainRun, TrainSpec
from train.engine import World, start, stop
from train.export import export_adapter, export_pipeline, merged_unet, trained_unet
from train.journal import read_lines
from train.loop import Trainer, make_trainer, open_stream

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusion-dpo, balanceddpo]
---

# {name}

`{base}` aligned with consensus labels (BalancedDPO, arXiv 2503.12575).

| | |
|---|---|
| optimizer steps | {steps} of {batch} pairs |
| labels | `{labels}`, {pairs} decided pairs |
| trained | {trained} |
| reference | {reference} |
| objective, timesteps | {objective}, {timesteps} |
| beta, lr | {beta:g}, {lr:g} |
| precision, ZeRO stage | {precision}, {zero} |
| loss, implicit accuracy (last tenth) | {loss:.4f}, {accuracy:.3f} |

Settings and revisions are in `balanceddpo.json`; the other parts of the pipeline are the base's.
"""

LN_2 = " (ln 2 = 0.6931 is no change)"

NO_CHANGE = {
    Objective.dpo: LN_2,
    Objective.margin_dpo: LN_2,
    Objective.sdpo: LN_2,
    Objective.ipo: " (0.25 is no change)",
    Objective.mapo: "",
}
"""What the loss is where policy and reference agree."""


def execute(run: TrainRun) -> None:
    """Train from wherever the run stands to the end, and export the result."""
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|diffusers|transformers)\b.*")
    world = start(run.train.device)
    console = Console(quiet=world.rank != 0, highlight=False, soft_wrap=True)
    stream = open_stream(run, world)
    console.print(
        f"{len(stream.pairs)} decided pairs · {stream.epoch_batches} batches of {run.train.batch} "
        f"an epoch · up to {stream.window_bytes / 2**20:.0f} MiB of pairs in memory a process"
    )
    trainer = make_trainer(run, world, stream, console)
    if world.rank == 0:  # not before: a mistyped model must not claim the folder
        write_json(run.folder / "config.json", provenance(run, world))
    trainer.resume()
    trainer.train()
    export(trainer)
    summarise(trainer)
    world.barrier()
    stop()


def export(trainer: Trainer) -> None:
    """Write the pipeline, and before it the adapter; every rank takes part, rank 0 writes."""
    run, world = trainer.run, trainer.world
    weights = trainer.policy.weights()
    if world.rank != 0:
        return
    base, lora = trainer.nets.backbone.base.folder, run.train.lora
    made, card = provenance(run, world) | {"step": trainer.step}, model_card(trainer)
    if lora.rank:
        adapter = in_diffusers_format(weights, lora.scale)
        export_adapter(adapter, run.adapter, made, card)
        unet = merged_unet(base, adapter)
    else:
        unet = trained_unet(base, weights)
    export_pipeline(base, unet, run.pipeline, made, card)


def provenance(run: TrainRun, world: World) -> dict[str, Any]:
    """What decides the weights, and what is worth knowing besides."""
    packages = ("torch", "diffusers", "transformers", "deepspeed")
    return {
        "settings": run.settings,
        "label_set": str(run.labels),
        "label_set_identity": run.settings["labels"],
        "base": run.model.path,
        "base_revision": run.model.revision,
        "processes": world.size,
        "device": str(world.device),
        "code_revision": code_revision(),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
    }


def last_tenth(folder: Path) -> dict[str, float]:
    """Mean loss and accuracy of the last tenth of the journal."""
    lines = read_lines(folder / "journal.jsonl")
    tail = lines[-max(1, len(lines) // 10) :]
    return {key: sum(line[key] for line in tail) / len(tail) for key in ("loss", "accuracy")}


def model_card(trainer: Trainer) -> str:
    """The README of the pipeline."""
    run, spec = trainer.run, trainer.run.train
    rule = spec.reference
    moved = f"{rule.refresh.value} every {rule.every} steps, {trainer.reference.version} times"
    return CARD.format(
        name=run.folder.parent.name,
        base=run.model.path,
        steps=trainer.step,
        batch=spec.batch,
        labels=run.labels.name,
        pairs=len(trainer.stream.pairs),
        trained=f"LoRA of rank {spec.lora.rank}" if spec.lora.rank else "all weights of the UNet",
        reference=moved if trainer.reference.version else "the base, frozen",
        objective=spec.objective.kind.value,
        timesteps=spec.timesteps.kind.value,
        beta=strength(spec),
        lr=spec.lr,
        precision=spec.precision.value,
        zero=spec.zero.stage,
        **last_tenth(run.folder),
    )


def strength(spec: TrainSpec) -> float:
    """The beta that the objective uses."""
    mapo = spec.objective.kind is Objective.mapo
    return spec.objective.mapo_beta if mapo else spec.beta


def summarise(trainer: Trainer) -> None:
    """The last words in the terminal."""
    numbers = last_tenth(trainer.run.folder)
    console, kind = trainer.console, trainer.run.train.objective.kind
    console.print(
        f"trained {trainer.step} steps of {trainer.run.train.batch} pairs · "
        f"loss {numbers['loss']:.4f}{NO_CHANGE[kind]} · "
        f"accuracy {numbers['accuracy']:.2f} · reference renewed {trainer.reference.version} times"
    )
    console.print(f"pipeline: {trainer.run.pipeline}")
