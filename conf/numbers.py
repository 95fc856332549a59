"""Numbers that no setting can be, whatever it means: checked in one place for all stages."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = 2**31 - 1
"""What a count is at most: libraries index with 32 bits."""
MOST = {
    "seed": 2**63 - 1,
    "pairs.side_seed": 2**63 - 1,
    "label.workers": 1024,
    "train.workers": 1024,
    "evaluate.judge_workers": 1024,
    "evaluate.resamples": 1_000_000,
    "train.collective_timeout_s": 10_000_000,
}
"""The same of single settings: threads far above what helps, and resamples of which more would
change no digit that is shown. A timeout may be a third of a year."""


def check_lists(value: Any, name: str = "") -> None:
    """Refuse a list of lists, which no setting is; the message has the setting's whole name.

    Raises:
        ValueError: Names the setting and what it is.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key != "options":
                check_lists(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(part, list | Mapping) for part in value):
        raise ValueError(f"{name}={value}; it must be a list of single values")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse a number that is not finite, too large, or a negative count.

    `settings` are all of a job's as plain values. A setting that has a narrower range checks it
    itself.

    Raises:
        ValueError: Names the setting and what is allowed.
    """
    for name, value in _numbers(settings):
        most = MOST.get(name, LARGEST)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}; it must be a finite number")
            if name in MOST and value > most:
                raise ValueError(f"{name}={value:g}; it must be at most {most:g}")
        elif not 0 <= value <= most:
            raise ValueError(f"{name}={value}; it must be a whole number from 0 to {most}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in nested settings, with its whole name; those of `options` are free."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key != "options":
                yield from _numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
