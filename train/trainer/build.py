"""From settings to a trainer: the stream, the models, the callbacks."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from data.distributed import num_workers
from data.pairs import open_pairs
from data.pairs.schema import PairSource
from train.config import BucketKind, TrainSpec
from train.distributed.deepspeed_engine import Policy
from train.distributed.policy_average import make_average
from train.distributed.world import World
from train.distributed.zero_config import advice as zero_advice
from train.dpo.auto_beta import AutoBeta
from train.dpo.draws import DrawRule
from train.dpo.objectives import make_criterion, timestep_rule
from train.dpo.reference import make_reference
from train.dpo.step import Models, absent
from train.identity import TrainRun
from train.loader.dataset import DecidedPairs, decided_pairs
from train.loader.latent_source import latents_of
from train.loader.loader import PairStream, StreamPlan
from train.loader.text_source import open_texts
from train.models.activation_checkpointing import checkpoint_activations
from train.models.channels_last import keep_channels_last
from train.models.components import ModelComponents, load_components
from train.models.flops import forward_flops, pair_flops
from train.models.lora import attach, counts
from train.models.lora_start import load_start, read_start
from train.models.memory import estimate_memory
from train.trainer.adjustments import AdjustBeta, RefreshReference, UpdateAverage
from train.trainer.metrics_log import MetricsLog
from train.trainer.progress import ShowProgress
from train.trainer.resume import SaveCheckpoints
from train.trainer.samples import Samples, make_samples
from train.trainer.trainer import Callback, RunState, Trainer
from train.trainer.validation import Validation, make_validation, split


def limit_micro_batch(run: TrainRun, world_size: int) -> TrainRun:
    """The run with micro-batches no larger than a process's part of a batch, or than a unit."""
    if run.train.batch % world_size:
        return run  # the stream refuses this with a message
    micro_batch = min(run.train.micro_batch, run.train.batch // world_size)
    if run.train.buckets.kind is not BucketKind.none:
        micro_batch = min(micro_batch, run.train.buckets.unit)
    return replace(run, train=replace(run.train, micro_batch=micro_batch))


def open_stream(run: TrainRun, world: World) -> PairStream:
    """Open this rank's pairs; mistakes in the data that can be noticed early are noticed here."""
    if world.rank == 0:
        open_pairs(run.pairs)  # may generate the miniature's pairs
    world.barrier()
    source = open_pairs(run.pairs)
    plan = StreamPlan(
        seed=run.seed,
        batch=run.train.batch,
        micro_batch=run.train.micro_batch,
        window=run.train.window,
        sizes=run.train.buckets.sizes(run.model.resolution),
        unit=run.train.buckets.unit,
        rank=world.rank,
        world_size=world.world_size,
        workers=num_workers(run.train.workers),
        memory_mb=run.train.memory_mb,
    )
    pairs = split(decided_pairs(run.labels, source), run.train.validation)
    return stream_of(run, pairs, source, plan)


def stream_of(
    run: TrainRun, pairs: DecidedPairs, source: PairSource, plan: StreamPlan
) -> PairStream:
    """A stream of some of the pairs, from the images or latents that the run trains on.

    Raises:
        ShardError: Latents or encoded prompts are damaged, or not those of the pairs.
    """
    latents = texts = None
    if run.latents:
        latents = latents_of(run.latents, pairs, mirrored=run.train.flip)
    if run.texts:
        prompts = pairs.table["prompt"].unique().to_pylist()
        texts = open_texts(run.texts, prompts, run.train.samples.prompts)
    return PairStream(pairs, source, plan, latents, texts)


def held_out_stream(run: TrainRun, stream: PairStream) -> PairStream | None:
    """A stream of the held-out pairs, if any; only to pick from, so any number of them will do."""
    if stream.pairs.held_out is None:
        return None
    alone = replace(stream.plan, batch=1, unit=1, micro_batch=1, rank=0, world_size=1)
    return stream_of(run, stream.pairs.held_out, stream.source, alone)


def make_trainer(run: TrainRun, world: World, stream: PairStream, console: Console) -> Trainer:
    """Load the model, and make of it the policy, the reference, and what checks them."""
    spec = run.train
    components = load_components(
        run.model,
        spec.precision,
        world.device,
        with_vae=run.latents is None or spec.samples.every > 0,
        texts=stream.texts,
        shift=spec.timesteps.shift,
    )
    votes = stream.pairs.table["margin"].to_numpy()
    criterion = make_criterion(spec.objective, votes, components.num_timesteps)
    uses_reference = criterion(spec.first_beta).uses_reference
    denoiser = policy_denoiser(run, components)
    memory = estimate_memory(counts(denoiser), spec, world.world_size)
    console.print(f"memory: {replace(memory, others=components.frozen_bytes)}")
    if warning := zero_advice(spec, world):
        console.print(f"[yellow]{warning}[/]")
    draw_rule = draw_rule_of(run, components)
    validation = make_validation(
        spec.validation, held_out_stream(run, stream), stream.plan, components, denoiser, draw_rule
    )
    condition, family = components.condition_of_new([""]), components.base.family
    square = components.latent_shape(components.square)
    forward = round(forward_flops(denoiser, family, square, condition) * stream.relative_area)
    policy = Policy(denoiser, spec, world)
    reference = make_reference(lambda: arranged(components.denoiser(), spec), policy, spec, world)
    compared = reference.denoiser if uses_reference else absent
    metrics_log = MetricsLog(run, world.rank == 0, console)
    samples = make_samples(spec.samples, components, stream.pairs, run.seed, metrics_log)
    return Trainer(
        run=run,
        world=world,
        stream=stream,
        models=Models(components, policy, compared),
        policy=policy,
        reference=reference,
        average=make_average(policy, spec.ema),
        draw_rule=draw_rule,
        criterion=criterion,
        state=RunState(AutoBeta(spec.first_beta)),
        pair_flops=pair_flops(
            forward,
            uses_reference=uses_reference,
            frozen_base=bool(spec.lora.rank),
        ),
        callbacks=ordered(
            AdjustBeta() if spec.is_beta_auto else None,
            validation,
            metrics_log,
            samples,
            ShowProgress(console),
        ),
    )


def ordered(
    adjust_beta: AdjustBeta | None,
    validation: Validation | None,
    metrics_log: MetricsLog,
    samples: Samples | None,
    progress: ShowProgress,
) -> list[Callback]:
    """The callbacks of a run, in the order in which each step calls them.

    The refresh is part of the step: validation, samples and checkpoint see the refreshed reference,
    and the checkpoint has the next step's beta.
    Validation adds to the line before it is logged. The log and the samples come before the
    checkpoint: a run that is killed between them repeats the step and writes both again, while
    after the checkpoint they would be lost.
    """
    followers = RefreshReference(), UpdateAverage(), adjust_beta
    callbacks = (*followers, validation, metrics_log, samples, SaveCheckpoints(), progress)
    return [callback for callback in callbacks if callback is not None]


def policy_denoiser(run: TrainRun, components: ModelComponents) -> Any:
    """The base's denoiser, with an adapter if one is trained."""
    spec, denoiser = run.train, components.denoiser()
    if spec.lora.rank:
        usual = list(components.base.family.lora_targets)
        lora = replace(spec.lora, targets=spec.lora.targets or usual)
        attach(denoiser, lora, run.seed, with_reference=not spec.reference_is_base)
        if lora.start is not None:
            load_start(denoiser, read_start(components.base, lora))
    return arranged(denoiser, spec)


def draw_rule_of(run: TrainRun, components: ModelComponents) -> DrawRule:
    """The distribution of the random choices of each pair."""
    return DrawRule(
        seed=run.seed,
        num_timesteps=components.num_timesteps,
        latent_shape=components.latent_shape,
        timesteps=timestep_rule(run.train.timesteps),
        flip=run.train.flip,
        caption_dropout=run.train.caption_dropout,
    )


def arranged(denoiser: Any, spec: TrainSpec) -> Any:
    """Set how a denoiser is executed and stored, by the settings; its numbers stay the same."""
    checkpoint_activations(denoiser, spec.gradient_checkpointing)
    if spec.channels_last:
        keep_channels_last(denoiser)
    if spec.compile:
        if not getattr(denoiser, "_repeated_blocks", None):  # SD3's class does not name them
            denoiser._repeated_blocks = denoiser._no_split_modules
        denoiser.compile_repeated_blocks()
    return denoiser
