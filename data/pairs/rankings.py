"""What the layouts with lists of rankings share: HPDv2, HPDv3 and ImageRewardDB.

A ranking of n images gives n(n - 1)/2 pairs, in the order of the list; equal ranks give a tie.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import combinations
from typing import Any, TypeAlias

from data.pairs.kinds import RANK, TEXT, Kind, json_value, shown
from data.pairs.schema import PairsError
from data.storage.base import Store

Row: TypeAlias = tuple[str | None, str | None, str | None, float | None]
"""Prompt, path of image 0, path of image 1, human choice."""


def ranking_rows(where: str, prompt: Any, images: Any, ranks: Any) -> Iterator[Row]:
    """All pairs of a ranking, where a lower rank is better; an unusable one keeps a single row.

    Raises:
        PairsError: A value has another type; begins with `where`.
    """
    text = json_value(where, "the prompt", prompt, TEXT)
    paths = _values(where, "the list of images", images, TEXT)
    numbers = _values(where, "the list of ranks or choices", ranks, RANK)
    if len(paths) != len(numbers) or len(paths) < 2:
        yield text, None, None, None
        return
    for (left, rank_0), (right, rank_1) in combinations(zip(paths, numbers, strict=True), 2):
        yield text, left, right, better(rank_0, rank_1)


def _values(where: str, what: str, values: Any, kind: Kind) -> list[Any]:
    """The elements of a list; null is an empty one."""
    if not isinstance(values, list | None):
        raise PairsError(f"{where}: {what} is {shown(values)}; it must be a list")
    return [json_value(where, what, value, kind) for value in values or ()]


def better(rank_0: float | None, rank_1: float | None) -> float | None:
    """The human choice by two ranks, lower is better: 1, 0, or 0.5 when equal; None if unknown."""
    if rank_0 is None or rank_1 is None:
        return None
    if rank_0 == rank_1:
        return 0.5
    return 1.0 if rank_0 < rank_1 else 0.0


def is_swapped(seed: int, left: str, right: str) -> bool:
    """Whether the left image becomes image 1, drawn from (seed, both paths).

    A place in a list, or a name, may tell which image won, and says nothing to a model.
    """
    key = f"{seed}/{left}\0{right}".encode("utf-8", "surrogateescape")
    return bool(blake2b(key, digest_size=1).digest()[0] & 1)


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
        root.refuse_pointer(name)
        raise PairsError(f"{path} is no JSON file: {error}; fetch it again") from error
    if not isinstance(value, list) or not (not value or isinstance(value[0], dict)):
        raise PairsError(f"{path} is not the list of objects that the layout has")
    return [entry if isinstance(entry, dict) else {} for entry in value]
