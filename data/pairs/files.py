"""The files of a pair set: which there are, and whether they have what is needed."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError
from data.storage import open_store
from data.storage.base import Store

ROOT_HINT = (
    "give the folder of the pair files (pairs=pickapic pairs.root=/path/to/pickapic_v2/data), or "
    "its URL (hf://datasets/..., s3://...)"
)


def open_root(spec: PairsSpec) -> Store:
    """Open the folder or object store that `pairs.root` names.

    Raises:
        StoreError: There is no such folder, or no way to it.
    """
    return open_store("pairs.root", spec.root, ROOT_HINT)


def find_files(root: Store, prefix: str, suffix: str, *, deep: bool = True) -> list[str]:
    """List the files of a split, sorted by path.

    Raises:
        PairsError: There is none; the message names some that are there.
    """
    every = root.names(f"**/*{suffix}" if deep else f"*{suffix}")
    files = [name for name in every if PurePosixPath(name).name.startswith(prefix)]
    if not files:
        others = sorted({PurePosixPath(name).name for name in every})[:3]
        kind = {".parquet": "Parquet", ".json": "JSON"}.get(suffix, suffix)
        there = f"it has {', '.join(others)}" if others else f"it has no {kind} file at all"
        raise PairsError(f"no {prefix}*{suffix} under pairs.root={root.url}; {there}")
    return files


def size_of(root: Store, name: str) -> int:
    """The bytes of a file that was listed.

    Raises:
        PairsError: It is gone.
    """
    size = root.size(name)
    if size is None:
        raise PairsError(f"{root.url}/{name} was there a moment ago; rerun the same command")
    return size


def check_names(where: str, wanted: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a file that lacks a column or key.

    Raises:
        PairsError: Names what is missing, the nearest match, and what there is.
    """
    missing = [name for name in wanted if name not in names]
    if missing:
        near = difflib.get_close_matches(missing[0], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PairsError(
            f"{where} lacks the columns {', '.join(missing)}; {hint}it has {', '.join(names)}"
        )


def text_of(value: Any) -> str | None:
    """The value if it is text, else None; surrogates, which Arrow refuses, become ?."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
