"""Arrow schemas of every file the program writes, and the words that fill them."""

from collections.abc import Sequence
from enum import StrEnum

import pyarrow as pa


class Status(StrEnum):
    """What became of a row or of one of its images; every row has exactly one."""

    OK = "ok"
    UNREADABLE_IMAGE = "unreadable_image"
    TOO_LARGE = "too_large"
    EMPTY_PROMPT = "empty_prompt"
    NOT_FINITE = "not_finite_score"
    NOT_FINITE_LATENT = "not_finite_latent"
    NOT_FINITE_IMAGE = "not_finite_image"
    """Of generated pairs alone."""


class Role(StrEnum):
    """How a judge stands to the labels it judges."""

    VOTER = "voter"
    HELD_OUT = "held_out"
    ORACLE = "oracle"


SCORES = pa.schema(
    [
        ("pair_id", pa.string()),
        ("score_0", pa.float32()),
        ("score_1", pa.float32()),
        ("status_0", pa.string()),
        ("status_1", pa.string()),
    ]
)
"""One metric's scores of a pair shard, row for row; a score is null where its status is not ok."""

PAIR_FACTS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("image_0", pa.string()),
        ("image_1", pa.string()),
        ("width_0", pa.int32()),
        ("height_0", pa.int32()),
        ("width_1", pa.int32()),
        ("height_1", pa.int32()),
        ("human", pa.float32()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""What the scoring pass learns of a pair apart from any metric (`scores/pairs/`), row for row."""


def latents(num_bytes: int | None, *, flip: bool) -> pa.Schema:
    """VAE latents of a pair shard, row for row: `num_bytes` of each image, null where it is bad.

    Both images' are null where the pair's status is not ok; `flipped_` are those of the mirrored
    images. None is for sets of several sizes: `width` and `height` are those of the pair's, in
    pixels.
    """
    names = ["latent_0", "latent_1", *(["flipped_0", "flipped_1"] if flip else [])]
    kind = pa.binary() if num_bytes is None else pa.binary(num_bytes)
    sizes = [("width", pa.int32()), ("height", pa.int32())] if num_bytes is None else []
    blobs = [pa.field(name, kind) for name in names]
    return pa.schema([("pair_id", pa.string()), ("status", pa.string()), *sizes, *blobs])


TEXT_PROMPTS = pa.schema([("prompt", pa.string())])
"""The prompts of a set of texts, in the order of its rows."""


def texts(states: int, pooled: int, *, length: bool = False) -> pa.Schema:
    """Encoded prompts: so many bytes of states and, unless 0, of the pooled form; and `length`."""
    kinds = {"states": states, "pooled": pooled}
    blobs = [(name, pa.binary(size)) for name, size in kinds.items() if size]
    return pa.schema([*blobs, ("length", pa.int32())] if length else blobs)


def labels(metrics: Sequence[str]) -> pa.Schema:
    """The label shards' schema for these metrics; wide columns, so that filters push down."""
    per_metric = [
        field
        for metric in metrics
        for field in (
            pa.field(f"score_{metric}_0", pa.float32()),
            pa.field(f"score_{metric}_1", pa.float32()),
            pa.field(f"vote_{metric}", pa.int8()),
        )
    ]
    facts = [PAIR_FACTS.field(name) for name in PAIR_FACTS.names]
    before, after = facts[:10], facts[10:]  # sizes stand before the votes, the human label after
    tally = [
        pa.field("votes_0", pa.int8()),
        pa.field("votes_1", pa.int8()),
        pa.field("margin", pa.int8()),
        pa.field("winner", pa.int8()),
        pa.field("decided_by", pa.string()),
    ]
    return pa.schema([*before, *per_metric, *tally, *after])


def sample_scores(metrics: Sequence[str]) -> pa.Schema:
    """One row per generated image: where it is and what every judge gave it."""
    return pa.schema(
        [
            ("prompts_name", pa.string()),
            ("prompt_id", pa.int32()),
            ("prompt", pa.string()),
            ("seed", pa.int64()),
            ("model", pa.string()),
            ("path", pa.string()),
            *[(f"score_{metric}", pa.float32()) for metric in metrics],
        ]
    )


WIN_RATES = pa.schema(
    [
        ("prompts_name", pa.string()),
        ("metric", pa.string()),
        ("role", pa.string()),
        ("base", pa.string()),
        ("model", pa.string()),
        ("prompts", pa.int32()),
        ("seeds", pa.int32()),
        ("wins", pa.int32()),
        ("ties", pa.int32()),
        ("losses", pa.int32()),
        ("win_rate", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("mean_base", pa.float64()),
        ("mean_model", pa.float64()),
        ("p_value", pa.float64()),
    ]
)
"""One row per prompt set and metric; rates in [0, 1] with ties counted half."""

PICKAPIC = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
"""The columns of Pick-a-Pic v2, in its order."""

OWN_PAIRS = pa.schema(
    [
        *PICKAPIC,
        *[
            pa.field(f"{name}_{side}", kind)
            for name, kind in (
                ("fingerprint", pa.string()),
                ("seed", pa.int64()),
                ("steps", pa.int32()),
                ("guidance", pa.float64()),
            )
            for side in (0, 1)
        ],
        pa.field("scheduler", pa.string()),
        pa.field("resolution", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
"""Generated pairs: Pick-a-Pic's columns without a human choice, and what made each image. An image
that is not finite is null, and its row's status says so."""
