"""Contenders in turns, so that a machine that is busy meanwhile slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REST_S = 0.5
"""In which a reading thread fills its queue before the next contender's turn."""


def race(
    contenders: Mapping[str, Callable[[], Any]], *, blocks: int, steps: int, pairs: int
) -> dict[str, list[float]]:
    """Pairs a second of each contender, whose steps take so many pairs, block by block.

    Nothing is compared by a single block, so it needs no rests.
    """
    rest_s = REST_S if blocks > 1 else 0.0
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks + 1):
        for name, run in contenders.items():
            time.sleep(rest_s)
            began = time.perf_counter()
            for _ in range(steps):
                run()
            if block:  # the first one warms up
                speeds[name].append(steps * pairs / (time.perf_counter() - began))
    return speeds


def ratio(one: Sequence[float], two: Sequence[float]) -> float:
    """Median of the blocks' ratios."""
    return statistics.median(a / b for a, b in zip(one, two, strict=True))
