"""The README of a finished pipeline: what it is, how it was trained, and its metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from train.config import (
    BucketKind,
    LoraSpec,
    LrSchedule,
    Objective,
    ObjectiveSpec,
    Quantize,
    TrainSpec,
)
from train.identity import TrainRun
from train.trainer.metrics_log import read_lines
from train.trainer.trainer import Trainer

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusion-dpo, balanceddpo]
---

# {name}

`{base}` aligned with consensus labels (BalancedDPO, arXiv 2503.12575): several scorers vote on each
pair of images, and the model is trained to prefer the winners (Diffusion-DPO, arXiv 2311.12908).

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})
pipeline("a prompt").images[0].save("image.png")
```

## How it was made

| | |
|---|---|
| optimizer steps | {steps} of {batch} pairs |
| labels | `{labels}`, {pairs} decided pairs |
| trained | {trained} |
| forward process | {process} |
| reference | {reference} |
| objective, timesteps | {objective}, {timesteps} |
| beta, lr | {beta}, {lr:g} |
| warm-up, schedule | {warmup} steps, {schedule} |
| resolution | {resolution} |
| precision, ZeRO stage | {precision}, {zero} |
| processes, device | {processes}, {device} |
| seed | {seed} |

Settings and revisions are in `balanceddpo.json`; the other parts of the pipeline are the base's.

## What is known of it

| | |
|---|---|
| loss, implicit accuracy (last tenth of the steps) | {loss:.4f}, {accuracy:.3f} |
{more}
These numbers are of training and say little about images. Win rates against the base, by scorers
that voted and by others, come from `python -m evaluate`.

## Limits

It learned what its scorers like, with their biases, on the prompts of its pairs; all other limits
and the licence are those of the base.
"""


def model_card(trainer: Trainer, *, averaged: str = "") -> str:
    """The README of the pipeline; `averaged` says it of weights that are."""
    run, spec = trainer.run, trainer.run.train
    lines = read_lines(run.folder / "journal.jsonl")
    refresh = spec.reference
    moved = (
        f"{refresh.refresh.value} every {refresh.every} steps, {trainer.reference.version} times"
    )
    return CARD.format(
        name=run.folder.parent.name,
        without="".join(f", {part}=None" for part in trainer.models.components.base.absent_parts),
        base=run.model.path,
        steps=trainer.state.step,
        batch=spec.batch,
        labels=run.labels.name,
        pairs=len(trainer.stream.pairs),
        trained=_trained(spec.lora, run.model.quantize) + averaged,
        process=trainer.models.components.base.process,
        reference=moved if trainer.reference.version else f"{_start(spec.lora)}, frozen",
        objective=_objective(spec.objective),
        timesteps=spec.timesteps.kind.value,
        beta=beta_description(spec, trainer.state.beta.beta),
        lr=spec.lr,
        warmup=spec.warmup,
        schedule=_schedule(spec),
        resolution=_resolution(run),
        precision=spec.precision.value,
        zero=spec.zero.stage,
        processes=trainer.world.world_size,
        device=trainer.world.device.type,
        seed=run.seed,
        more="".join(f"| {name} | {value} |\n" for name, value in _known(trainer, lines).items()),
        **{name: value for name, value in last_tenth(lines).items() if name != "pairs_per_s"},
    )


def _resolution(run: TrainRun) -> str:
    kind = run.train.buckets.kind
    buckets = "" if kind is BucketKind.none else f", buckets={kind.value}"
    return f"{run.model.resolution} pixels{buckets}"


def _known(trainer: Trainer, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the rows that not every run has."""
    rows, held_out = {}, trainer.stream.pairs.held_out
    if (line := last_validation(lines)) is not None and held_out is not None:
        rises = (line[f"validation_{side}_rise"] for side in ("winner", "loser"))
        accuracy = f"{line['validation_accuracy']:.3f}"
        rows[f"accuracy on {len(held_out)} held-out pairs, against the base"] = accuracy
        rows["rise of their winners' and losers' errors"] = ", ".join(f"{r:+.2%}" for r in rises)
    if any(line.get("both_rise") for line in lines):
        rows["warning"] = "both errors rose over the reference at some steps"
    return rows


def _objective(objective: ObjectiveSpec) -> str:
    """Return the objective, with what is added to it."""
    added = {
        "smoothed by votes": objective.vote_smoothing,
        f"smoothing {objective.smoothing:g}": objective.smoothing,
        f"winner anchor {objective.anchor:g}": objective.anchor,
    }
    return " + ".join([objective.kind.value, *(text for text, is_on in added.items() if is_on)])


def _trained(lora: LoraSpec, stored: Quantize) -> str:
    """Return what was trained, from where, and on what if that is not the base itself."""
    if not lora.rank:
        return "all weights of the denoiser"
    rounded = "" if stored is Quantize.none else f", on the base rounded to {stored.value}"
    return f"LoRA of rank {lora.rank}{rounded}" + (f", from {_start(lora)}" if lora.start else "")


def _start(lora: LoraSpec) -> str:
    """Return what the policy was before the first step."""
    return f"the adapter `{lora.start}`" if lora.start else "the base"


def _schedule(spec: TrainSpec) -> str:
    """Return how the learning rate goes on after the warm-up."""
    falls = spec.lr_schedule is not LrSchedule.constant
    return spec.lr_schedule.value + (f", to {spec.lr_end:g} of lr" if falls else "")


def last_tenth(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over the last tenth of the log."""
    tail = lines[-max(1, len(lines) // 10) :]
    names = ("loss", "accuracy", "pairs_per_s")
    return {name: sum(line[name] for line in tail) / len(tail) for name in names}


def last_validation(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the last line with a validation."""
    validated = (line for line in reversed(lines) if line.get("validation_accuracy") is not None)
    return next(validated, None)


def beta_description(spec: TrainSpec, last: float | None = None) -> str:
    """Return the beta that the objective uses; `last` is what an automatic one has become."""
    if spec.objective.kind is Objective.mapo:
        return f"{spec.objective.mapo_beta:g}"
    if not spec.is_beta_auto:
        return f"{spec.first_beta:g}"
    auto = spec.auto_beta
    until = f" to {last:.0f}" if last else ""
    return f"auto, from {auto.start:g}{until}, for a mean gradient factor of {auto.target:g}"
