"""Stage one: score what is missing, count the votes, and summarise the result."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.ahead import check_later_stages
from conf.job import Job, settings
from data.artifacts.fingerprints import Fingerprints
from data.artifacts.latents import KIND as LATENTS
from data.artifacts.latents import LatentFormat
from data.artifacts.progress import progress_bar
from data.artifacts.texts import KIND as TEXTS
from data.artifacts.texts import TextFormat
from data.artifacts.texts import read_set as read_texts
from data.devices import Dtype, choose_device, means_gpu
from data.distributed import Rank
from data.families.text import TEXT_ON_HUB, find_text
from data.families.vae import VAE_WEIGHTS, find_vae, latent_shape
from data.pairs import open_pairs
from data.pairs.schema import PairSource
from data.storage.hub import Wanted, resolve
from label.analysis.console import print_statistics, print_summary
from label.metrics.registry import definition_of, resolve_all, score_settings, settle_dtypes
from label.metrics.weights import locate
from label.scoring.score_sets import ScoreSets, plan, remaining
from label.scoring.text_files import TextFiles, scored_prompts
from label.voting.label_set import LabelSet, label_settings, make_labels
from label.voting.rules import VotingRule

VAE_ON_HUB = (("model_index.json", "vae/config.json", VAE_WEIGHTS),)
"""What is fetched of a model's repository."""
WEIGHTS = "weights.json"
"""Hashes of weight files, remembered beside the scores."""


def main(job: Job) -> None:
    """Finish the run's labels; finished files are reused."""
    check_later_stages("label", job)
    job = replace(job, metrics=settle_dtypes(job.metrics, on_gpu=means_gpu(job.label.device)))
    rank, console, since = Rank.from_environment(), Console(), time.time()
    pairs = open_pairs(job.pairs)
    voting_rule = voting_rule_of(job)
    sets = score_sets(job, pairs, voting_rule)
    vote = label_settings(voting_rule, settings(job.vote), sets.metrics, pairs.shards)
    label_set = LabelSet(job.folder / "labels" / job.vote.name, vote)
    labelled = label_set.read_if_complete()
    if job.label.inspect:
        inspect(job, pairs, label_set, labelled, console)
        return
    texts = text_files(job, sets)
    if labelled is None or not (sets.has_latents() and has_texts(texts)):
        sets = sets if labelled is None else replace(sets, metrics={})  # nothing is scored again
        plan(sets, rank)  # damaged files are reported before any weight is loaded
        write_texts = text_writer(job, texts, rank, console)
        if sets.unfinished():
            score(job, pairs, sets, rank, console)
        if rank.is_first:
            sets.declare_complete(provenance(job), since)
            if labelled is None:
                labelled = make_labels(label_set, sets, voting_rule, provenance(job), since)
        write_texts(since)
    if rank.is_first and labelled is not None:
        print_summary(console, labelled, str(label_set.folder))
        print_caches(sets, texts, console)


def print_caches(sets: ScoreSets, texts: TextFiles | None, console: Console) -> None:
    """Say where latents and texts are, if they are wanted."""
    if sets.latents:
        where = f"latents: {sets.folder_of(LATENTS)} ({sets.latents})"
        console.print(where, highlight=False, soft_wrap=True)
    if texts:
        where = f"texts: {texts.folder} ({read_texts(texts.folder)})"
        console.print(where, highlight=False, soft_wrap=True)


def check(job: Job) -> None:
    """Check the metrics that the vote needs, before there are pairs; loads no weight.

    Raises:
        ValueError: One cannot be used, or is no voter.
    """
    voting_rule = voting_rule_of(job)
    resolve_all({name: job.metrics[name] for name in voting_rule.metrics})


def voting_rule_of(job: Job) -> VotingRule:
    """Who votes in this run.

    Raises:
        ValueError: A voter is of a kind that never votes.
    """
    for name in job.panel.voters:
        if not definition_of(name, job.metrics[name].kind).can_vote:
            raise ValueError(f"panel.voters has {name}: the oracle judges, it never votes")
    ties = {name: spec.tie for name, spec in job.metrics.items() if spec.tie}
    return VotingRule(job.vote, tuple(job.panel.voters), ties, job.seed)


def score_sets(job: Job, pairs: PairSource, voting_rule: VotingRule) -> ScoreSets:
    """The score sets that the vote needs; finds weights, loads none."""
    folder = job.folder / "scores"
    weights = folder / WEIGHTS
    metrics = score_settings({name: job.metrics[name] for name in voting_rule.metrics}, weights)
    return ScoreSets(folder, pairs.shards, metrics, latent_format(job, Fingerprints(weights)))


def latent_format(job: Job, fingerprints: Fingerprints) -> LatentFormat | None:
    """What latents are to be written; None where none are wanted.

    Raises:
        ValueError: The model has no VAE, or its size does not suit it.
    """
    spec = job.label.latents
    if not spec.write:
        return None
    vae, buckets = find_vae(model_folder(job), fingerprints), job.train.buckets
    if spec.moments and not vae.has_posterior:
        raise ValueError(
            f"label.latents.moments=true keeps a standard deviation, but an image has always the "
            f"same latents in the autoencoder of model.path={job.model.path}; set it to false"
        )
    sizes = buckets.sizes(job.model.resolution)
    for size in sizes if len(sizes) > 1 else ():
        if size.width % vae.factor or size.height % vae.factor:
            raise ValueError(
                f"buckets={buckets.kind.value} has images of {size} pixels, which are no multiples "
                f"of {vae.factor}, the VAE's factor; change train.buckets.step"
            )
    return LatentFormat(
        vae=vae.sha256,
        size=job.model.resolution,
        shape=latent_shape(vae, job.model.resolution),
        dtype=spec.dtype.value,
        moments=spec.moments,
        flip=spec.flip,
        compute=(Dtype.fp32 if vae.force_upcast else spec.compute).value,
        buckets=sizes if len(sizes) > 1 else (),
    )


def model_folder(job: Job) -> Path:
    """The model's folder on this disk; of a hub id at a commit, its VAE is fetched."""
    return locate("model.path", job.model.path, job.model.revision, VAE_ON_HUB)


def text_files(job: Job, sets: ScoreSets) -> TextFiles | None:
    """What prompts are to be encoded into; None where they are not wanted.

    Raises:
        ValueError: The model is of no family, or one of its text encoders is missing.
    """
    spec, model = job.label.texts, job.model
    if not spec.write:
        return None
    wanted = Wanted(patterns=(TEXT_ON_HUB,), refresh=True)  # latents fetch the VAE alone
    folder = resolve("model.path", model.path, model.revision, wanted)
    text = find_text(folder, Fingerprints(sets.folder / WEIGHTS))
    form = TextFormat(
        family=text.family.name,
        encoders=text.sha256,
        dtype=spec.dtype.value,
        compute=spec.compute.value,
    )
    num_pairs = sum(shard.rows for shard in sets.shards)
    place, gather = job.folder / TEXTS / form.name, partial(scored_prompts, sets)
    return TextFiles(place, form, folder, text, num_pairs, gather)


def has_texts(texts: TextFiles | None) -> bool:
    """Whether the encoded prompts are complete, or none are wanted."""
    return texts is None or texts.is_complete()


def text_writer(
    job: Job, texts: TextFiles | None, rank: Rank, console: Console
) -> Callable[[float], None]:
    """What encodes the prompts once all pairs are scored; it is told when this run began.

    The model's text encoders are checked now. Where the set is complete there is nothing to do.

    Raises:
        ValueError: A text encoder or tokenizer is damaged, or of another architecture.
    """
    if texts is None or texts.is_complete():
        return lambda _: None
    from label.scoring.text_writer import PromptEncoder, write_texts  # torch, which takes seconds

    device = choose_device("label.device", job.label.device, rank)
    encoder = PromptEncoder(texts, job.label.texts.batch)
    encoder.check()

    def write(since: float) -> None:
        write_texts(texts, encoder, rank, device, console if rank.is_first else None)
        if rank.is_first:
            texts.declare_complete(provenance(job), since)

    return write


def score(job: Job, pairs: PairSource, sets: ScoreSets, rank: Rank, console: Console) -> None:
    """Score this process's shards, then whatever other processes have not finished."""
    from label.scoring.progress import PairCount
    from label.scoring.runner import ScoringRunner  # torch, which a finished run skips

    count = PairCount(sets)
    device = choose_device("label.device", job.label.device, rank)
    make_encoder = None
    if sets.latents:
        from label.scoring.vae_encoder import VaeEncoder

        batch = job.label.latents.batch
        make_encoder = partial(VaeEncoder, model_folder(job), sets.latents, device, batch)
    scoring = ScoringRunner(pairs, sets, count, job.metrics, job.label, device, make_encoder)
    shown = console if rank.is_first else None
    with progress_bar("scoring pairs", count.total, count.done, shown):
        scoring.run(remaining(sets, rank))
    if rank.is_first:
        scoring.say(console)


def inspect(
    job: Job, pairs: PairSource, label_set: LabelSet, labelled: Any, console: Console
) -> None:
    """Print all statistics of a finished label set and write its report."""
    if labelled is None:
        raise ValueError(f"{label_set.folder} is not complete; run `make labels` first")
    from label.analysis.gallery import galleries
    from label.analysis.generators import generators
    from label.analysis.report import write_report
    from label.analysis.statistics import compute_statistics

    voting_rule = voting_rule_of(job)
    statistics = compute_statistics(labelled, voting_rule, generators(pairs))
    print_statistics(console, labelled, statistics)
    shown = galleries(labelled, pairs, job.label.gallery_pairs)
    path = write_report(label_set.folder, statistics, shown, label_set.facts())
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def provenance(job: Job) -> dict[str, Any]:
    """What is worth knowing of a run but does not decide its rows."""
    packages = ("torch", "transformers", "open_clip_torch", "numpy", "pillow", "pyarrow", "polars")
    return {
        "versions": {name: version(name) for name in packages},
        "label": settings(job.label),
        "metrics": {name: settings(spec) for name, spec in job.metrics.items()},
    }
