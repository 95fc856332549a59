"""A whole run of stage two once torch is imported: from the labels to the finished pipeline."""

import os
import platform
import time
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from rich.console import Console

from data.artifacts.atomic import write_json
from data.artifacts.config_diff import differences
from data.artifacts.manifest import code_revision
from data.distributed import Rank
from data.images import Size
from train.config import BucketKind, BucketSpec, CacheUse, Objective, TrainSpec
from train.distributed.optimizer import check_optimizer
from train.distributed.policy_average import PolicyAverage
from train.distributed.world import (
    LostContactError,
    World,
    is_communication_error,
    start,
    stop,
)
from train.distributed.zero_config import check_sums
from train.dpo.auto_beta import limits
from train.export.model_card import beta_description, last_tenth, last_validation, model_card
from train.export.pipeline import (
    export_adapter,
    export_pipeline,
    merged_denoiser,
    trained_denoiser,
)
from train.export.single_file import check_single_file, export_single_file
from train.identity import TrainRun
from train.loader.crops import describe_cuts
from train.loader.loader import PairStream
from train.loader.source_choice import advice
from train.models.base_model import BaseModel, check_buckets, check_settings, open_model
from train.models.fit import check_fits, gpu_bytes
from train.models.lora import in_diffusers_format
from train.models.lora_start import follow_start
from train.trainer.build import limit_micro_batch, make_trainer, open_stream
from train.trainer.metrics_log import read_lines
from train.trainer.resume import resume
from train.trainer.trackers import check_trackers
from train.trainer.trainer import Trainer

LN_2 = " (ln 2 = 0.6931 is no change)"

NO_CHANGE = {
    Objective.dpo: LN_2,
    Objective.margin_dpo: LN_2,
    Objective.sdpo: LN_2,
    Objective.ipo: " (0.25 is no change)",
    Objective.linear_dpo: "",
    Objective.mapo: "",
}
"""The loss if policy and reference agree; empty where it depends on the pairs."""


def execute(run: TrainRun) -> None:
    """Train from where the run stands to the end.

    Raises:
        LostContactError: Another process ended, or did not answer in time.
    """
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|diffusers|transformers)\b.*")
    check_trackers(run)
    try:
        train(run, start(run.train.device, run.train.collective_timeout_s))
    except RuntimeError as error:
        here = Rank.from_environment()
        if here.world_size == 1 or not is_communication_error(error):
            raise
        raise LostContactError(
            f"rank {here.rank} on {platform.node()} lost contact with the others ({error}): one of "
            "them ended, or did not answer within train.collective_timeout_s="
            f"{run.train.collective_timeout_s:g}. Look for its error above, or for a kill; then "
            "rerun the same command, and it resumes"
        ) from error
    stop()


def train(run: TrainRun, world: World) -> None:
    """Train, and export the result."""
    check_alike(run, world)
    console = Console(quiet=world.rank != 0, highlight=False, soft_wrap=True)
    base = open_model(run.model)
    run = checked(run, base, world)
    console.print(f"model: {base.process} ({base.family.name})")
    if run.train.is_beta_auto:
        console.print(f"beta: {beta_description(run.train)}")
    if run.train.ema:
        console.print(f"average of the policy's weights: decay {run.train.ema:g}, {run.average}")
    run = limit_micro_batch(run, world.world_size)
    stream = open_stream(run, world)
    console.print(
        f"{len(stream.pairs)} decided pairs · {stream.epoch_batches} batches of {run.train.batch} "
        f"an epoch · up to {stream.window_bytes / 2**20:.0f} MiB of pairs in memory a process"
    )
    arithmetic = batch_arithmetic(run.train, stream, world)
    for line in (*cut_lines(run, stream), arithmetic, *run.sources, latent_advice(run, stream)):
        if line:
            console.print(line)
    trainer = make_trainer(run, world, stream, console)
    if world.rank == 0:  # not before: a mistyped model must not claim the folder
        write_json(run.folder / "config.json", provenance(run, world))
    resume(trainer, console)
    trainer.train()
    export(trainer)
    summarise(trainer, console)
    world.barrier()


def checked(run: TrainRun, base: BaseModel, world: World) -> TrainRun:
    """The run with the settings of the adapter that it starts from, if it can be trained.

    Raises:
        ValueError: It cannot; no weight has been loaded yet.
    """
    check_settings(base, run.model, run.train)
    check_buckets(base, run.model.resolution, run.train.buckets)
    check_optimizer(run.train, world)
    check_sums(run.train, world)
    if run.train.export.single_file:
        check_single_file(base)
    run = replace(run, train=replace(run.train, lora=follow_start(run.train.lora, base)))
    if (available := gpu_bytes(world.device)) is not None:
        check_fits(base, run.model, run.train, world.world_size, available)
    return run


def check_alike(run: TrainRun, world: World) -> None:
    """Check that all processes have the same settings and the same run folder.

    Raises:
        ValueError: This one has not; says how it differs, and what to change.
    """
    if world.world_size == 1:
        return
    first = world.broadcast(run.train)
    if differing := differences(asdict(first), asdict(run.train)):
        raise ValueError(
            f"rank 0 was started with other settings than rank {world.rank} "
            f"({'; '.join(differing)}); give every machine the same command"
        )
    mark = run.folder.parent / world.broadcast(f".seen-{os.getpid()}-{time.time_ns()}")
    if world.rank == 0:
        write_json(mark, {})
    world.barrier()
    is_shared = mark.exists()
    world.barrier()
    if world.rank == 0:
        mark.unlink()
    if not is_shared:
        raise ValueError(
            f"{mark.parent.absolute()} on {platform.node()} is another folder than that of rank 0; "
            "set runs=... to one that all machines share"
        )


def batch_arithmetic(spec: TrainSpec, stream: PairStream, world: World) -> str:
    """The numbers that runs are compared by: what makes a step, and how much is seen in all."""
    ranks, unit = stream.plan.world_size, "GPU" if world.device.type == "cuda" else "process"
    each = spec.batch // ranks
    return (
        f"{spec.steps} steps of {spec.batch} pairs · {each} pairs a {unit} x {ranks} · "
        f"micro-batches of {spec.micro_batch}, gradient accumulation {each // spec.micro_batch} · "
        f"{spec.steps * spec.batch} pairs seen, {spec.steps / stream.epoch_batches:.2f} epochs"
    )


def cut_lines(run: TrainRun, stream: PairStream) -> list[str]:
    """How much of the images is cut and how they are scaled, with buckets and without."""
    side, buckets = run.model.resolution, run.train.buckets
    others: tuple[Size, ...] = (Size(side, side),)
    if buckets.kind is BucketKind.none:
        usual = BucketSpec(kind=BucketKind.free)
        others = usual.sizes(side) if side % usual.step == 0 else ()
    return describe_cuts(stream.pairs.table, stream.plan.sizes, others, buckets.unit)


def latent_advice(run: TrainRun, stream: PairStream) -> str:
    """Say if latents would be faster."""
    if run.latents or run.train.latents is CacheUse.never:
        return ""
    return advice(run.train.steps, run.train.batch, len(stream.pairs))


def export(trainer: Trainer) -> None:
    """Write average and adapter, if there are any, then the pipeline. All gather, rank 0 writes."""
    run, world = trainer.run, trainer.world
    weights = trainer.policy.gather_fp32_state_dict()
    if world.rank != 0:
        return
    if trainer.average is not None:
        export_average(trainer, trainer.average)
    base, lora = trainer.models.components.base, run.train.lora
    about, card = about_result(trainer), model_card(trainer)
    if lora.rank:
        adapter = in_diffusers_format(weights, lora.scale, base.family.denoiser)
        export_adapter(base, adapter, run.adapter, about, card)
        denoiser = merged_denoiser(base, adapter)
    else:
        denoiser = trained_denoiser(base, weights)
    if run.train.export.single_file:
        export_single_file(base, denoiser, run.single_file)
    export_pipeline(base, denoiser, run.pipeline, about, card, scheduler_settings(trainer))


def export_average(trainer: Trainer, average: PolicyAverage) -> None:
    """Write the policy's average as a pipeline or, for LoRA, as an adapter.

    It is read from the checkpoint of the last step, which has all ranks' parts.
    """
    run, base, lora = trainer.run, trainer.models.components.base, trainer.run.train.lora
    assert trainer.state.checkpoint is not None
    weights = average.whole(trainer.state.checkpoint)
    about = about_result(trainer) | {"average": average.decay}
    card = model_card(trainer, averaged=f", averaged over the steps (decay {average.decay:g})")
    if lora.rank:
        adapter = in_diffusers_format(weights, lora.scale, base.family.denoiser)
        export_adapter(base, adapter, run.average, about, card)
    else:
        denoiser, scheduler = trained_denoiser(base, weights), scheduler_settings(trainer)
        export_pipeline(base, denoiser, run.average, about, card, scheduler)


def about_result(trainer: Trainer) -> dict[str, Any]:
    """What is written beside a result: `provenance`, and the step."""
    return provenance(trainer.run, trainer.world) | {"step": trainer.state.step}


def scheduler_settings(trainer: Trainer) -> dict[str, str]:
    """What the result's scheduler must say besides the base's, so that any sampler is right."""
    base, prediction = trainer.models.components.base, trainer.run.model.prediction_type
    said = {"prediction_type": prediction.value} if prediction else {}
    return said | base.process.spacing_to_set(base.config.scheduler)


def provenance(run: TrainRun, world: World) -> dict[str, Any]:
    """What decides the weights, and what else is worth recording."""
    packages = ("torch", "diffusers", "transformers", "deepspeed")
    return {
        "settings": run.settings,
        "label_set": str(run.labels),
        "label_set_identity": run.settings["labels"],
        "base": run.model.path,
        "base_revision": run.model.revision,
        "processes": world.world_size,
        "device": str(world.device),
        "code_revision": code_revision(),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
    }


def summarise(trainer: Trainer, console: Console) -> None:
    """Print a summary of the run."""
    run = trainer.run
    lines = read_lines(run.folder / "journal.jsonl")
    numbers, kind = last_tenth(lines), run.train.objective.kind
    console.print(
        f"trained {trainer.state.step} steps of {run.train.batch} pairs · "
        f"loss {numbers['loss']:.4f}{NO_CHANGE[kind]} · "
        f"accuracy {numbers['accuracy']:.2f} · reference renewed {trainer.reference.version} times"
    )
    if run.train.is_beta_auto:
        beta = trainer.state.beta.beta
        console.print(f"beta: {beta_description(run.train, beta)}")
        if beta in limits(run.train.auto_beta):
            console.print(
                "[yellow]beta ended where train.auto_beta.range ends[/] and the factor is not what "
                "was wanted: none is below 1 - accuracy; change train.auto_beta.target or start"
            )
    seconds = sum(run.train.batch / line["pairs_per_s"] for line in lines) * run.train.log_every
    waited = sum(line["data_wait_s"] for line in lines) * run.train.log_every
    console.print(
        f"about {seconds / 60:.1f} min in steps · {numbers['pairs_per_s']:.1f} pairs/s · "
        f"{waited / seconds:.1%} of it waiting for data"
    )
    if (line := last_validation(lines)) is not None:
        console.print(
            f"held-out pairs against the base: accuracy {line['validation_accuracy']:.2f} "
            f"(0.5 is chance) · winners' error {line['validation_winner_rise']:+.1%} · "
            f"losers' {line['validation_loser_rise']:+.1%}"
        )
    if any(line.get("both_rise") for line in lines):
        console.print("[yellow]both errors rose[/] at some steps, see both_rise in journal.jsonl")
    if trainer.average is not None:
        console.print(f"average: {run.average}")
    console.print(f"pipeline: {run.pipeline}")
