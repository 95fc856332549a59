"""The files of a pair set: which there are, and whether they have what is needed."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from data.pairs.config import PairsSpec
from data.pairs.kinds import LONGEST_SHOWN
from data.pairs.schema import PairsError
from data.pairs.splits import EVERY, files_of_split, splits_of
from data.storage import open_store
from data.storage.base import Store

ROOT_HINT = (
    "give the folder of the pair files (pairs=pickapic pairs.root=/path/to/pickapic_v2/data), or "
    "its URL (hf://datasets/..., s3://...)"
)

NUM_SHOWN = 40
"""Columns that a message names."""


def open_root(spec: PairsSpec) -> Store:
    """Open the folder or object store that `pairs.root` names.

    Raises:
        StoreError: There is no such folder, or no way to it.
    """
    return open_store("pairs.root", spec.root, ROOT_HINT)


def find_files(
    root: Store, split: str, suffix: str, *, lead: str = "", deep: bool = True
) -> list[str]:
    """List the files of a split, sorted by path; their names begin with `lead`, if any.

    Raises:
        PairsError: There is none, or an empty split would mix several; names some that are there.
    """
    every = root.names(f"**/*{suffix}" if deep else f"*{suffix}")
    every = [name for name in every if PurePosixPath(name).name.startswith(lead)]
    if not split:
        refuse_mixed(f"pairs.root={root.url}", "pairs.split", splits_of(every, lead))
    files = files_of_split(every, split, PurePosixPath(root.url).name, lead)
    if not files:
        kind = {".parquet": "Parquet", ".json": "JSON"}.get(suffix, suffix)
        there = f"it has {', '.join(every[:3])}" if every else f"it has no {kind} file at all"
        say = f"; the split {split!r} is the whole name before a number, or a folder's: pairs.split"
        raise PairsError(
            f"no {lead}{split}*{suffix} under pairs.root={root.url}; {there}{say if every else ''}"
        )
    return files


def refuse_mixed(where: str, setting: str, splits: Sequence[str]) -> None:
    """Refuse to take the files of several splits together unless that is what was set.

    Raises:
        PairsError: Names them.
    """
    if len(splits) > 1:
        raise PairsError(
            f"{where} has files of the splits {', '.join(splits)}; choose one, as "
            f"{setting}={splits[-1]}, or take all of them with {setting}={EVERY}"
        )


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
            f"{where} lacks the columns {', '.join(missing)}; {hint}it has {shortened(names)}"
        )


def shortened(names: Sequence[str]) -> str:
    """Names for a message: as many as a few lines take."""
    shown = [name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..." for name in names]
    more = f" and {len(shown) - NUM_SHOWN} more" if len(shown) > NUM_SHOWN else ""
    return ", ".join(shown[:NUM_SHOWN]) + more
