"""Pair sets that list images and rankings: HPDv2, HPDv3 and ImageRewardDB.

A ranking of n images gives n(n - 1)/2 pairs, in the order of the list; equal ranks give a tie.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from data.pairs.config import PairsSpec
from data.pairs.files import check_names, find_files, text_of
from data.pairs.image_list import ListedPairs, as_listed, listed_pairs
from data.pairs.image_store import ARCHIVES
from data.pairs.parquet_file import open_file, read_columns
from data.pairs.schema import PairsError
from data.storage.base import Store

Row: TypeAlias = tuple[str | None, str | None, str | None, float | None]
"""Prompt, path of image 0, path of image 1, human choice."""

HPDV2_PREFERENCE = ("prompt", "file_path", "human_preference")
HPDV2_RANKING = ("prompt", "image_path", "rank")
HPDV3 = ("prompt", "path1", "path2")
IMAGEREWARD = ("image_path", "prompt_id", "prompt", "rank")


def open_hpdv2(root: Store, spec: PairsSpec) -> ListedPairs:
    """HPDv2: `train.json` with one choice of two, `test.json` with averaged rankings of many.

    Images lie in `train/` and `test/`, or in train.tar and test.tar.
    """
    files = find_files(root, spec.split, ".json", deep=False)
    listings = {name: as_listed(hpdv2_rows(root, name)) for name in files}
    prefixes = ("", *dict.fromkeys(PurePosixPath(name).stem for name in files))
    return listed_pairs(root, spec, listings, prefixes)


def hpdv2_rows(root: Store, name: str) -> Iterator[Row]:
    """The pairs of an HPDv2 list."""
    entries = read_entries(root, name)
    ranked = bool(entries) and "rank" in entries[0]
    names = HPDV2_RANKING if ranked else HPDV2_PREFERENCE
    if entries:
        check_names(f"{root.url}/{name}, first entry,", names, list(entries[0]))
    for entry in entries:
        prompt, images, judged = (entry.get(name) for name in names)
        ranks = judged if ranked else _negated(judged)
        yield from ranking_rows(prompt, images, ranks)


def open_hpdv3(root: Store, spec: PairsSpec) -> ListedPairs:
    """HPDv3: path1 was always preferred, so sides are drawn, or a bias of position would hide."""
    files = find_files(root, spec.split, ".json", deep=False)
    listings = {name: as_listed(hpdv3_rows(root, name, spec.side_seed)) for name in files}
    return listed_pairs(root, spec, listings, reading=f"sides by seed {spec.side_seed}")


def hpdv3_rows(root: Store, name: str, seed: int) -> Iterator[Row]:
    """The pairs of an HPDv3 list, each winner on the side that (seed, row) says."""
    entries = read_entries(root, name)
    if entries:
        check_names(f"{root.url}/{name}, first entry,", HPDV3, list(entries[0]))
    for row, entry in enumerate(entries):
        prompt, winner, loser = (text_of(entry.get(name)) for name in HPDV3)
        swapped = blake2b(f"{seed}/{row}".encode(), digest_size=1).digest()[0] & 1
        yield (prompt, loser, winner, 0.0) if swapped else (prompt, winner, loser, 1.0)


def open_imagereward(root: Store, spec: PairsSpec) -> ListedPairs:
    """ImageRewardDB: `metadata-<split>.parquet`, one row an image; images in `images/`, zipped.

    Every prompt's images make pairs; rank 1 is best.
    """
    files = find_files(root, f"metadata-{spec.split}", ".parquet")
    listings = {name: as_listed(imagereward_rows(root, name)) for name in files}
    folders = dict.fromkeys(PurePosixPath(name).parent.as_posix() for name in files)
    prefixes = dict.fromkeys(["", "images", *folders])
    archives = (*ARCHIVES, "images/*/*.zip")
    return listed_pairs(root, spec, listings, tuple(prefixes), archives=archives)


def imagereward_rows(root: Store, name: str) -> Iterator[Row]:
    """The pairs of an ImageRewardDB table, prompt by prompt in order of first appearance."""
    with open_file(root, name) as file:
        check_names(f"{root.url}/{name}", IMAGEREWARD, file.schema_arrow.names)
    table = read_columns(root, name, IMAGEREWARD)
    prompts: dict[Any, list[dict[str, Any]]] = {}
    for image in table.to_pylist():
        prompts.setdefault(image["prompt_id"], []).append(image)
    for images in prompts.values():
        paths, ranks = ([image[name] for image in images] for name in ("image_path", "rank"))
        if len(images) > 1:  # one image alone is no pair
            yield from ranking_rows(images[0]["prompt"], paths, ranks)


def ranking_rows(prompt: Any, images: Any, ranks: Any) -> Iterator[Row]:
    """All pairs of a ranking, where a lower rank is better; an unusable one keeps a single row."""
    usable = isinstance(images, list) and isinstance(ranks, list) and len(images) == len(ranks) >= 2
    if not usable:
        yield text_of(prompt), None, None, None
        return
    for (left, rank_0), (right, rank_1) in combinations(zip(images, ranks, strict=True), 2):
        yield text_of(prompt), text_of(left), text_of(right), better(rank_0, rank_1)


def better(rank_0: Any, rank_1: Any) -> float | None:
    """The human choice by two ranks, lower is better: 1, 0, or 0.5 when equal; None if unknown."""
    if not all(isinstance(rank, (int, float)) and rank == rank for rank in (rank_0, rank_1)):
        return None
    if rank_0 == rank_1:
        return 0.5
    return 1.0 if rank_0 < rank_1 else 0.0


def read_entries(root: Store, name: str) -> Sequence[dict[str, Any]]:
    """The objects of a JSON list; anything else in it becomes an empty object.

    Raises:
        PairsError: The file is no JSON list.
    """
    path = f"{root.url}/{name}"
    try:
        with root.open(name) as file:
            value = json.loads(file.read().decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{path} is no JSON file: {error}") from error
    if not isinstance(value, list) or not (not value or isinstance(value[0], dict)):
        raise PairsError(f"{path} is not the list of objects that the layout has")
    return [entry if isinstance(entry, dict) else {} for entry in value]


def _negated(judged: Any) -> Any:
    """Preferences as ranks: the preferred one, 1, comes first."""
    if not isinstance(judged, list):
        return None
    return [-value if isinstance(value, (int, float)) else None for value in judged]
