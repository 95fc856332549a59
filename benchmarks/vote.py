"""How long a new vote over a set of Pick-a-Pic's size takes: `make bench-vote`.

959 040 pairs in 645 files, as in Pick-a-Pic v2, five metrics, 1.2 % of rows bad. Scores are drawn
at random, pair files have no images; everything else is what `make labels VOTE=...` meets: score
shards on disk in, label shards and their manifest out. Seconds on the clock depend on what else the
machine does; seconds of CPU, over all threads, hardly do. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from conf.job import Job, composed, settings
from data.artifacts.parquet_io import write_table
from data.artifacts.schemas import PAIR_FACTS, SCORES
from data.pairs import open_pairs
from data.pairs.schema import PairShard, PairSource
from label.run import provenance, score_sets, voting_rule_of
from label.scoring.score_sets import FACTS, ScoreSets
from label.voting.label_set import LabelSet, label_settings, make_labels, read_scored
from label.voting.rules import VotingRule, label_pairs

PAIRS, FILES, PROMPTS = 959_040, 645, 58_960
BAD = 0.012
METRICS = ("hps", "clip", "pickscore", "aesthetic", "clip_again")
SIZES = (512, 576, 640, 704, 768, 1024)


def main() -> None:
    """Build the set in a temporary folder, vote, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the set here; default: a temporary one")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="bench-vote-"))
    try:
        arguments = build(folder, chosen.pairs, chosen.files)
        report(measure(arguments, chosen.repeats), chosen.pairs, chosen.files)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder)


# --- the set -------------------------------------------------------------------------------------


def build(folder: Path, num_pairs: int, num_files: int) -> list[str]:
    """Pair files and score shards below `folder`; the settings that lead there."""
    arguments = [
        "experiment=miniature", f"runs={folder}/runs", "run=bench", f"pairs.root={folder}/pairs",
        "pairs=pickapic", "+metric@metrics.clip_again=miniature_clip",
        f"panel.voters=[{','.join(METRICS)}]",
    ]  # fmt: skip
    rows = [num_pairs // num_files + (i < num_pairs % num_files) for i in range(num_files)]
    for number, count in enumerate(rows):
        path = folder / "pairs" / f"train-{number:05d}-of-{num_files:05d}.parquet"
        if not path.exists():
            write_pairs(path, number, count)
    job = composed(arguments)
    pairs = open_pairs(job.pairs)
    sets = score_sets(job, pairs, voting_rule_of(job))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda shard: write_scores(sets, pairs, shard), pairs.shards))
    sets.declare_complete(provenance(job), time.time())
    return arguments


def write_pairs(path: Path, number: int, count: int) -> None:
    """A pair file in Pick-a-Pic's schema without its images."""
    chance = np.random.default_rng(number)
    label = chance.choice([0.0, 0.5, 1.0], count, p=[0.44, 0.12, 0.44])
    nothing = pa.nulls(count, pa.binary())
    table = pa.table(
        {
            "caption": [prompt(i) for i in chance.integers(0, PROMPTS, count).tolist()],
            "image_0_uid": [uid(number, i, 0) for i in range(count)],
            "image_1_uid": [uid(number, i, 1) for i in range(count)],
            "jpg_0": nothing, "jpg_1": nothing,
            "label_0": label, "label_1": 1 - label,
            "has_label": np.ones(count, bool),
        }
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=500)


def prompt(number: int) -> str:
    """About as long as people's prompts are."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return " ".join(digest[i : i + 5] for i in range(0, 20 + number % 44, 5))


def uid(file: int, row: int, side: int) -> str:
    """An image's name; as long as a UUID."""
    name = hashlib.blake2b(f"{file}/{row}/{side}".encode(), digest_size=16).hexdigest()
    return f"{name[:8]}-{name[8:12]}-{name[12:16]}-{name[16:20]}-{name[20:]}"


def write_scores(sets: ScoreSets, pairs: PairSource, shard: PairShard) -> None:
    """The facts and every metric's scores of one pair file."""
    if not sets.missing(shard):
        return
    chance, n = np.random.default_rng([1, shard.index]), shard.rows
    bad = chance.random(n) < BAD
    status = np.where(bad, "unreadable_image", "ok")
    read = pq.read_table(
        Path(pairs.root, shard.file), columns=["caption", "image_0_uid", "image_1_uid", "label_0"]
    )
    sizes = chance.choice(SIZES, (n, 4), p=[0.6, 0.02, 0.05, 0.03, 0.25, 0.05])
    facts = {
        "pair_id": [f"{chance.bytes(16).hex()}-0" for _ in range(n)],
        "prompt": read["caption"],
        "source": [shard.name] * n,
        "row": np.arange(n),
        "image_0": read["image_0_uid"],
        "image_1": read["image_1_uid"],
        **{name: sizes[:, i] for i, name in enumerate(["width_0", "height_0", "width_1",
                                                       "height_1"])},
        "human": read["label_0"],
        "status": status,
        "reason": np.where(bad, "image 0: no bytes", ""),
    }  # fmt: skip
    arrays = [pa.array(facts[f.name]) if not isinstance(facts[f.name], pa.ChunkedArray)
              else facts[f.name] for f in PAIR_FACTS]  # fmt: skip
    table = pa.table([a.cast(f.type) for a, f in zip(arrays, PAIR_FACTS, strict=True)],
                     schema=PAIR_FACTS)  # fmt: skip
    settings_of_facts = sets.settings(FACTS, shard)
    settings_of_facts["source"]["sha256"] = "0" * 64
    write_table(sets.path(FACTS, shard), table, settings_of_facts)
    quality = chance.normal(size=(n, 2))
    for metric in sets.metrics:
        values = (quality + 1.5 * chance.normal(size=(n, 2))).astype(np.float32)
        scores = {
            "pair_id": facts["pair_id"],
            **{f"score_{i}": pa.array(values[:, i], mask=bad) for i in (0, 1)},
            "status_0": status, "status_1": status,
        }  # fmt: skip
        write_table(
            sets.path(metric, shard), pa.table(scores, schema=SCORES), sets.settings(metric, shard)
        )


# --- the measurement -----------------------------------------------------------------------------


Seconds = dict[str, list[tuple[float, float]]]
"""What was measured -> (seconds on the clock, seconds of CPU) of each repetition."""


def measure(arguments: list[str], repeats: int) -> Seconds:
    """Each part, a whole vote in this process, and the commands."""
    job = composed(arguments)
    pairs = open_pairs(job.pairs)
    voting_rule, sets = voting_rule_of(job), score_sets(job, pairs, voting_rule_of(job))
    results: Seconds = {}
    for repeat in range(repeats):
        parts(job, pairs, voting_rule, sets, results, repeat)
        name = f"whole_{repeat}"
        with clock(results, "total"):
            make_labels(
                label_set(job, voting_rule, sets, name), sets, voting_rule, provenance(job), 0.0
            )
        with clock(results, "command"):
            run_command([*arguments, f"vote.name=command_{repeat}"])
        with clock(results, "inspect"):
            run_command([*arguments, f"vote.name=command_{repeat}", "label.inspect=true"])
        for kind in ("parts", "whole", "command"):
            shutil.rmtree(job.folder / "labels" / f"{kind}_{repeat}")
    return results


def parts(
    job: Job,
    pairs: PairSource,
    voting_rule: VotingRule,
    sets: ScoreSets,
    result: Seconds,
    repeat: int,
) -> None:
    """The same vote step by step."""
    with clock(result, "read"):
        scored = read_scored(sets, voting_rule.metrics)
    with clock(result, "vote"):
        labelled = label_pairs(scored, voting_rule)
    with clock(result, "write"):
        label_set(job, voting_rule, sets, f"parts_{repeat}").write(
            labelled, sets, voting_rule.metrics
        )
    with clock(result, "floor"):  # the same bytes without anything of ours
        floor(job.folder / "scores")
    assert labelled.height == sum(shard.rows for shard in pairs.shards)


def floor(scores: Path) -> None:
    """Read every score file with polars, and nothing else."""
    for folder in sorted(path for path in scores.iterdir() if path.is_dir()):
        pl.scan_parquet(folder / "part-*.parquet").collect()


def label_set(job: Job, voting_rule: VotingRule, sets: ScoreSets, name: str) -> LabelSet:
    """Where a vote of this name is written."""
    vote = label_settings(voting_rule, settings(job.vote), sets.metrics, sets.shards)
    return LabelSet(job.folder / "labels" / name, vote)


def run_command(arguments: list[str]) -> None:
    """`python -m label` in its own process."""
    subprocess.run(
        [sys.executable, "-m", "label", *arguments],
        check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


@contextmanager
def clock(result: Seconds, name: str) -> Iterator[None]:
    """Note the seconds of a block, its child processes included."""
    began, cpu = time.perf_counter(), cpu_seconds()
    yield
    result.setdefault(name, []).append((time.perf_counter() - began, cpu_seconds() - cpu))


def cpu_seconds() -> float:
    """Seconds of CPU of this process and of its ended children."""
    return sum(os.times()[:4])


WORDS = {
    "read": "read score shards, check them",
    "vote": "vote (polars)",
    "write": "write label shards, hash them",
    "total": "score shards on disk to label set on disk",
    "command": "make labels VOTE=..., interpreter and all",
    "inspect": "make inspect",
    "floor": "polars reading the score shards, unchecked",
}


def report(result: Seconds, num_pairs: int, num_files: int) -> None:
    """A table, and its figures as one JSON object on the last line."""
    cores = len(os.sched_getaffinity(0))
    title = f"{num_pairs:,} pairs, {num_files} files, {len(METRICS)} metrics, {cores} cores"
    table = Table(title=title, title_justify="left")
    for name in ("", "median s", "best s", "median CPU s"):
        table.add_column(name, justify="right" if name else "left")
    figures: dict[str, object] = {
        "pairs": num_pairs, "files": num_files, "metrics": len(METRICS), "cores": cores,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    for name, words in WORDS.items():
        wall, cpu = zip(*result[name], strict=True)
        row = statistics.median(wall), min(wall), statistics.median(cpu)
        table.add_row(words, *(f"{seconds:.2f}" for seconds in row))
        keys = (f"{name}_s", f"{name}_best_s", f"{name}_cpu_s")
        figures |= dict(zip(keys, (round(seconds, 3) for seconds in row), strict=True))
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
