"""Which pairs the label report shows, and their images."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import polars as pl

from data.images import UnreadableImageError, decode, encode_jpeg, to_pixels
from data.pairs.schema import PairShard, PairSource
from label.analysis.agreement import metrics_of
from label.voting.rules import VotingRule

LARGEST_SIDE = 320
"""Images are shown no larger, so that a report stays a few megabytes."""
SMALL_SIDE = 128
"""Images up to this size are shown with their pixels sharp."""


@dataclass(frozen=True, slots=True)
class Line:
    """One voter's view of a pair."""

    voter: str
    scores: tuple[str, str]
    """In words; a dash where there is none, empty for people, who give none."""
    vote: int
    """+1, -1, or 0 for no vote."""
    counts: bool
    """Whether the vote is counted."""


@dataclass(frozen=True, slots=True)
class Card:
    """A pair in a gallery."""

    prompt: str
    images: tuple[str, str]
    """Data URIs; empty where an image cannot be read."""
    small: bool
    winner: int | None
    decided_by: str
    tally: tuple[int, int]
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pairs that have something in common."""

    title: str
    rule: str
    """Which pairs these are."""
    num_pairs: int
    """How many there are, shown or not."""
    cards: list[Card]


def galleries(
    labelled: pl.DataFrame, voting_rule: VotingRule, pairs: PairSource, count: int
) -> list[Gallery]:
    """Unanimous, split, and flipped pairs: the first `count` of each in the order of their ids.

    Ids are hashes, so that these are as good as drawn at random, and the same every time.
    """
    cast = pl.col("votes_0") + pl.col("votes_1")
    won, human = 1 - 2 * pl.col("winner").cast(pl.Int8), (pl.col("human") - 0.5).sign()
    kinds = [
        ("Unanimous", "every vote is for the winner", (pl.col("margin") == cast) & (cast > 1)),
        ("Split", "as many votes for one as for the other",
         (pl.col("votes_0") == pl.col("votes_1")) & (cast > 0)),
        ("Flipped", "the label is not the human choice", (won != human) & (human != 0)),
    ]  # fmt: skip
    members = [
        labelled.filter(pl.col("status") == "ok", kind.fill_null(value=False))
        for _, _, kind in kinds
    ]
    chosen = [frame.bottom_k(count, by="pair_id").sort("pair_id") for frame in members]
    wanted = pl.concat(chosen).select("source", "row").unique()
    images, metrics = read_images(pairs, wanted.iter_rows()), metrics_of(labelled)
    return [
        Gallery(
            title, rule, len(frame),
            [_card(row, metrics, voting_rule, images) for row in some.iter_rows(named=True)],
        )
        for (title, rule, _), frame, some in zip(kinds, members, chosen, strict=True)
    ]  # fmt: skip


def read_images(
    pairs: PairSource, wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, str]]:
    """Data URIs of both images of the pairs named by (source, row); reads whole row groups."""
    rows: dict[str, list[int]] = {}
    for source, row in wanted:
        rows.setdefault(source, []).append(row)
    found = {}
    for shard in pairs.shards:
        for group, first, places in _groups(pairs, shard, sorted(rows.get(shard.name, ()))):
            table = pairs.read_row_group(shard, group).select(["image_0", "image_1"])
            for row in places:
                pair = table.slice(row - first, 1).to_pylist()[0]
                found[shard.name, row] = data_uri(pair["image_0"]), data_uri(pair["image_1"])
    return found


def _groups(
    pairs: PairSource, shard: PairShard, rows: list[int]
) -> Iterable[tuple[int, int, list[int]]]:
    """The row groups that hold these rows: number, first row, and which rows."""
    if not rows:
        return
    sizes = [size for size, _ in pairs.row_groups(shard)]
    for group, (first, size) in enumerate(zip(accumulate([0, *sizes]), sizes, strict=False)):
        if inside := [row for row in rows if first <= row < first + size]:
            yield group, first, inside


def data_uri(content: bytes | None) -> str:
    """A small JPEG of an encoded image, for an <img>; empty when it cannot be read."""
    try:
        image = decode(content or b"")
    except UnreadableImageError:
        return ""
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(to_pixels(image))).decode()


def _card(
    row: dict[str, Any],
    metrics: list[str],
    voting_rule: VotingRule,
    images: dict[tuple[str, int], tuple[str, str]],
) -> Card:
    lines = [
        Line(
            metric,
            (_words(row[f"score_{metric}_0"]), _words(row[f"score_{metric}_1"])),
            row[f"vote_{metric}"] or 0,
            metric in voting_rule.voters,
        )
        for metric in metrics
    ]
    human = row["human"]
    if human is not None:
        sign = (human > 0.5) - (human < 0.5)
        lines.append(Line("people", ("", ""), sign, voting_rule.spec.human_votes))
    return Card(
        prompt=row["prompt"],
        images=images.get((row["source"], row["row"]), ("", "")),
        small=max(row["width_0"], row["height_0"], row["width_1"], row["height_1"]) <= SMALL_SIDE,
        winner=row["winner"],
        decided_by=row["decided_by"].replace("_", " "),
        tally=(row["votes_0"], row["votes_1"]),
        lines=lines,
    )


def _words(score: float | None) -> str:
    return "–" if score is None else f"{score:.4g}"
