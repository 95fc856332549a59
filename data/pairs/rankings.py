"""What the layouts with lists of rankings share: HPDv2, HPDv3 and ImageRewardDB.

A ranking of n images gives n(n - 1)/2 pairs, in the order of the list; equal ranks give a tie.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, TypeAlias

from data.pairs.files import text_of
from data.pairs.schema import PairsError
from data.storage.base import Store

Row: TypeAlias = tuple[str | None, str | None, str | None, float | None]
"""Prompt, path of image 0, path of image 1, human choice."""


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
