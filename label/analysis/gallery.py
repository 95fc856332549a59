"""Which pairs the label report shows, and their images."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl

from data.images import UnreadableImageError, decode, encode_jpeg, to_pixels
from data.pairs.schema import PairSource
from label.analysis.agreement import HUMAN_VOTE, LABEL_VOTE

LARGEST_SIDE = 320
"""Images are shown no larger, so that a report stays a few megabytes."""


class Gallery(NamedTuple):
    """Pairs that have something in common."""

    title: str
    rule: str
    """Which pairs these are."""
    num_pairs: int
    """How many there are, shown or not."""
    pairs: list[dict[str, Any]]
    """Rows of the label set, with `vote_human`, and `images` as data URIs."""


def galleries(labelled: pl.DataFrame, pairs: PairSource, limit: int) -> list[Gallery]:
    """Unanimous, split, and flipped pairs: the first `limit` of each in the order of their ids.

    Ids are hashes, so these are as good as random, and the same every time.
    """
    votes = pl.col("votes_0") + pl.col("votes_1")
    kinds = [
        ("Unanimous", "every vote is for the winner", (pl.col("margin") == votes) & (votes > 1)),
        ("Split", "as many votes for one as for the other",
         (pl.col("votes_0") == pl.col("votes_1")) & (votes > 0)),
        ("Flipped", "the label is not the human choice",
         (LABEL_VOTE != HUMAN_VOTE) & (HUMAN_VOTE != 0)),
    ]  # fmt: skip
    scored = labelled.with_columns(vote_human=HUMAN_VOTE).filter(pl.col("status") == "ok")
    members = [scored.filter(kind) for _, _, kind in kinds]
    shown = [frame.bottom_k(limit, by="pair_id").sort("pair_id") for frame in members]
    images = read_images(pairs, pl.concat(shown).select("source", "row").unique().rows())
    return [
        Gallery(
            title, rule, len(frame),
            [
                row | {"images": images.get((row["source"], row["row"]), ("", ""))}
                for row in some.iter_rows(named=True)
            ],
        )
        for (title, rule, _), frame, some in zip(kinds, members, shown, strict=True)
    ]  # fmt: skip


def read_images(
    pairs: PairSource, places: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], tuple[str, str]]:
    """Data URIs of both images of the pairs at these (source, row); reads whole row groups."""
    images = {}
    for shard in pairs.shards:
        rows = sorted(row for source, row in places if source == shard.name)
        first = 0
        for group, (size, _) in enumerate(pairs.row_groups(shard) if rows else ()):
            if inside := [row for row in rows if first <= row < first + size]:
                table = pairs.read_row_group(shard, group).select(["image_0", "image_1"])
                for row in inside:
                    pair = table.slice(row - first, 1).to_pylist()[0]
                    images[shard.name, row] = data_uri(pair["image_0"]), data_uri(pair["image_1"])
            first += size
    return images


def data_uri(content: bytes | None) -> str:
    """An encoded image as a small JPEG for an <img>; empty if it cannot be read."""
    try:
        image = decode(content or b"")
    except UnreadableImageError:
        return ""
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(to_pixels(image))).decode()
