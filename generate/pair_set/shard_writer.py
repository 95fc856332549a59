"""Writes a block's pairs as one Parquet file, and the manifest of a complete set."""

import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from typing import Any

import pyarrow as pa

from data.artifacts.atomic import ShardError, remove_partials
from data.artifacts.config_diff import refuse_other_settings
from data.artifacts.manifest import Manifest, describe, write_manifest
from data.artifacts.parquet_io import read_settings, read_table, table_writer
from data.artifacts.schemas import OWN_PAIRS, Status
from data.distributed import num_workers
from data.pairs.own import KIND
from generate.config import ImageFormat
from generate.pair_set.pairing import pairs_of_prompt
from generate.pair_set.plan import PairPlan, PlannedImage

GROUP_ROWS = 64
"""Pairs of a row group, the most that is in memory: 200 MB of SDXL's images as PNG."""
BLOBS = ("jpg_0", "jpg_1")


class GoneError(Exception):
    """Another process has written a block's file and removed its images."""


def write_shard(plan: PairPlan, block: int) -> None:
    """Write a block's pairs from its images and remove these; the same images give the same bytes.

    Raises:
        ShardError: The file cannot be written, as on a full disk; the images are kept.
    """
    path = plan.shard(block)
    try:
        with table_writer(path, OWN_PAIRS, plan.settings, BLOBS) as writer:
            rows = _rows(plan, block)
            while group := list(islice(rows, GROUP_ROWS)):
                table = pa.Table.from_pylist(group, schema=OWN_PAIRS)
                writer.write_table(table, row_group_size=GROUP_ROWS)
    except GoneError:
        if not path.exists():
            raise ShardError(
                f"{plan.images_folder(block)} has lost images while {path} was written; run the "
                "same command again"
            ) from None
    shutil.rmtree(plan.images_folder(block), ignore_errors=True)


def _rows(plan: PairPlan, block: int) -> Iterator[dict[str, Any]]:
    """The block's pairs in the order of its prompts."""
    per_prompt = plan.num_pairs // len(plan.prompts.prompts)
    number = block * plan.spec.shard_prompts * per_prompt
    for prompt in plan.prompts_of(block):
        images = plan.images_of(block, prompt)
        contents = [_content(image) for image in images]
        for sides in pairs_of_prompt(plan.spec, prompt.text, plan.seed):
            row = _pair(plan, [images[k] for k in sides], [contents[k] for k in sides])
            yield row | {"num_example_per_prompt": per_prompt, "__index_level_0__": number}
            number += 1


def _content(image: PlannedImage) -> bytes | str:
    """An image's bytes, or the reason why there is none.

    Raises:
        GoneError: Neither is there any more.
    """
    try:
        if image.path.exists():
            return image.path.read_bytes()
        return image.failed.read_text()
    except FileNotFoundError as error:
        raise GoneError from error


def _pair(
    plan: PairPlan, images: Sequence[PlannedImage], contents: Sequence[bytes | str]
) -> dict[str, Any]:
    """A row in the columns of `OWN_PAIRS`; what is not named is null."""
    bad = [f"image {side}: {x}" for side, x in enumerate(contents) if isinstance(x, str)]
    row: dict[str, Any] = {
        "caption": images[0].prompt.text,
        "are_different": contents[0] != contents[1],
        "has_label": False,
        "ranking_id": images[0].prompt.id,
        "scheduler": plan.spec.scheduler.value,
        "resolution": plan.size.width if plan.size.width == plan.size.height else None,
        "status": str(Status.NOT_FINITE_IMAGE if bad else Status.OK),
        "reason": "; ".join(bad),
    }
    for side, (image, content) in enumerate(zip(images, contents, strict=True)):
        row |= {
            f"jpg_{side}": content if isinstance(content, bytes) else None,
            f"image_{side}_uid": image_uid(plan, image),
            f"model_{side}": image.model,
            f"fingerprint_{side}": plan.fingerprints[image.model],
            f"seed_{side}": image.seed,
            f"steps_{side}": image.steps,
            f"guidance_{side}": image.guidance,
        }
    return row


def image_uid(plan: PairPlan, image: PlannedImage) -> str:
    """Names an image by what it was made with, in the form of Pick-a-Pic's uids."""
    spec = plan.spec
    quality = spec.quality if spec.format is ImageFormat.jpeg else ""
    parts = (
        plan.fingerprints[image.model], image.prompt.text, image.seed, image.steps, image.guidance,
        spec.scheduler.value, spec.dtype.value, plan.size.recorded, spec.format.value, quality,
    )  # fmt: skip
    key = blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return str(uuid.UUID(bytes=key, version=4))


def declare_complete(plan: PairPlan, provenance: Mapping[str, Any], since: float) -> Manifest:
    """Write the manifest; `since` is when this run began, in seconds since the epoch.

    Raises:
        ShardError: A file is torn, was made with other settings, or has other rows than planned.
    """
    remove_partials(plan.folder, since)
    shards = [plan.shard(block) for block in range(plan.num_blocks)]
    statuses: Counter[str] = Counter()
    for path in shards:
        refuse_other_settings(path, read_settings(path), plan.settings)
        statuses.update(read_table(path, ["status"])["status"].to_pylist())
    if (rows := statuses.total()) != plan.num_pairs:
        raise ShardError(
            f"{plan.folder} has {rows} pairs, {plan.num_pairs} were planned; delete it and run the "
            "same command again"
        )
    with ThreadPoolExecutor(num_workers(None)) as threads:
        files = list(threads.map(describe, shards))
    manifest = Manifest(
        kind=KIND,
        settings=plan.settings,
        files=files,
        counts=dict(sorted(statuses.items())),
        provenance=dict(provenance),
    )
    write_manifest(plan.folder, manifest)
    return manifest
