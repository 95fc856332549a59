"""Stage one: `python -m label` scores what is missing, votes, and says what came of it."""

import time
from importlib.metadata import version
from typing import Any

from rich.console import Console

from conf.job import Job, entry, settings
from data.pairs import PairSource, open_pairs
from label.claims import Claims
from label.fingerprints import Fingerprints
from label.identity import identify
from label.labels import LabelSet, label_settings, make_labels
from label.plan import CLAIMS, Rank, ScoreSets, claim_work, plan, wait_for_change
from label.summary import print_statistics, print_summary
from label.vote import Ballot


def main(job: Job) -> None:
    """Finish the run's labels; what is there already is not made again."""
    rank, console, since = Rank.from_environment(), Console(), time.time()
    pairs = open_pairs(job.pairs)
    ballot = ballot_of(job)
    sets = score_sets(job, pairs, ballot)
    vote = label_settings(ballot, settings(job.vote), sets.metrics, pairs.shards)
    label_set = LabelSet(job.folder / "labels" / job.vote.name, vote)
    labelled = label_set.read_if_complete()
    if job.label.inspect:
        inspect(job, pairs, label_set, labelled, console)
        return
    if labelled is None:
        plan(sets, rank)  # what is wrong with finished files is said before any weight is loaded
        if sets.unfinished():
            score(job, pairs, sets, rank, console)
        if rank.rank == 0:
            Claims(sets.folder / CLAIMS).clear()
            sets.declare_complete(provenance(job), since)
            labelled = make_labels(label_set, sets, ballot, provenance(job), since)
    if rank.rank == 0 and labelled is not None:
        print_summary(console, labelled, str(label_set.folder))


def ballot_of(job: Job) -> Ballot:
    """Who votes in this run."""
    ties = {name: spec.tie for name, spec in job.metrics.items() if spec.tie}
    return Ballot(job.vote, tuple(job.panel.voters), ties, job.seed)


def score_sets(job: Job, pairs: PairSource, ballot: Ballot) -> ScoreSets:
    """The score sets that the vote needs; finds weights, loads none."""
    folder = job.folder / "scores"
    fingerprints = Fingerprints(folder / "weights.json")
    identities = [identify(name, job.metrics[name]) for name in ballot.metrics]
    for identity in identities:
        identity.check_sha256(fingerprints)
    found = {identity.name: identity.settings(fingerprints) for identity in identities}
    return ScoreSets(folder, pairs.shards, found)


def score(job: Job, pairs: PairSource, sets: ScoreSets, rank: Rank, console: Console) -> None:
    """Score the shards that this process can get; the first stays until all are scored."""
    from label.progress import bar
    from label.scoring import Scoring, device_of  # torch, which a finished run skips

    claims = Claims(sets.folder / CLAIMS)
    device = device_of(job.label.device, rank.local)
    scoring = Scoring(pairs, sets, claims, job.metrics, job.label, device)
    first = rank.rank == 0
    with claims.beating(), bar(sets, claims, console if first else None):
        scoring.run(claim_work(sets, rank, claims))
        while first and sets.unfinished():
            done = wait_for_change(sets, claims, job.label.patience_s)
            scoring.run(claim_work(sets, rank, claims, even_if_alive=not done))
    if first:
        scoring.say(console)


def inspect(
    job: Job, pairs: PairSource, label_set: LabelSet, labelled: Any, console: Console
) -> None:
    """Print all statistics of a finished label set and write its report."""
    if labelled is None:
        raise ValueError(f"{label_set.folder} is not complete; run `make labels` first")
    from label.report import write_report  # matplotlib

    print_statistics(console, labelled)
    path = write_report(label_set.folder, labelled, pairs, job.label.pictures)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def provenance(job: Job) -> dict[str, Any]:
    """What is worth knowing of a run but does not decide its rows."""
    packages = ("torch", "transformers", "open_clip_torch", "numpy", "pillow", "pyarrow", "polars")
    return {
        "versions": {name: version(name) for name in packages},
        "label": settings(job.label),
        "metrics": {name: settings(spec) for name, spec in job.metrics.items()},
    }


if __name__ == "__main__":
    entry(main)()
