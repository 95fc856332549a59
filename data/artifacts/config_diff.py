"""Compares the settings that decide what is in a set, and refuses to mix sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.artifacts.atomic import ShardError

Settings = Mapping[str, Any]
"""JSON values that decide what is in a set; two sets with equal settings hold equal rows."""


def differences(before: Settings, now: Settings) -> list[str]:
    """List every leaf in which two settings differ, as `path: found X, now Y`."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: found {old.get(key, 'nothing')}, now {new.get(key, 'nothing')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_other_settings(path: Path, before: Settings, now: Settings) -> None:
    """Refuse to mix rows made with different settings.

    Raises:
        ShardError: Names each difference.
    """
    if differing := differences(before, now):
        raise ShardError(
            f"{path} was made with other settings ({'; '.join(differing)}); "
            "set them back, choose another run folder (RUN=...), or delete this one"
        )


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [
            leaf
            for key, child in value.items()
            for leaf in _leaves(child, f"{path}.{key}" if path else str(key))
        ]
    return [(path, value)]
