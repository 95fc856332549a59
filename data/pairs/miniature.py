"""The miniature's pairs, drawn on first use into `pairs.root` in Pick-a-Pic's schema."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.miniature.pairs import write_pairs
from data.miniature.scenes import Split
from data.pairs import pickapic
from data.pairs.config import PairsSpec
from data.pairs.parquet_pairs import ParquetPairs
from data.pairs.schema import PairsError
from data.storage.paths import user_path

OPTIONS = ("num_pairs",)
"""What it reads of `pairs.options`."""
SEED, SHARDS = 7, 4
"""Of the pair set that the default run uses."""


def open_layout(spec: PairsSpec) -> ParquetPairs:
    """Draw `pairs.options.num_pairs` pairs unless they are there already, and open them.

    Raises:
        PairsError: The root is no folder of this machine, has other files, or there is no number.
    """
    num_pairs = spec.options.get("num_pairs")
    if not isinstance(num_pairs, int) or num_pairs < 1:
        raise PairsError(
            f"pairs.options.num_pairs={num_pairs}; the miniature needs a number of pairs, 1 or more"
        )
    if "://" in spec.root:
        raise PairsError(
            f"pairs=miniature draws its pairs into pairs.root, but {spec.root} is no folder of "
            "this machine; for a pair set that is there say its layout (pairs=pickapic)"
        )
    ensure_pairs(user_path(spec.root, "pairs.root"), num_pairs)
    return pickapic.open_layout(spec)


def ensure_pairs(folder: Path, num_pairs: int) -> None:
    """Draw the default train and validation pairs into `folder` unless they are there already.

    A set of another size is drawn anew; the validation set has a tenth of the pairs.
    """
    _ensure(folder, "train", num_pairs, SEED, min(SHARDS, num_pairs))
    _ensure(folder, "validation", max(1, num_pairs // 10), SEED + 1, 1)


def _ensure(folder: Path, split: Split, num_pairs: int, seed: int, shards: int) -> None:
    files = list(folder.glob(f"{split}-*-of-{shards:05d}.parquet"))
    if len(files) < shards or sum(map(_num_rows, files)) != num_pairs:
        refuse_strangers(folder)
        print(
            f"pairs=miniature: drawing {num_pairs} {split} pairs into {folder} "
            "(pairs of your own need their layout: pairs=pickapic, parquet, jsonl, ...)",
            file=sys.stderr,
        )
        write_pairs(folder, num_pairs, seed, shards, split)


def refuse_strangers(folder: Path) -> None:
    """Never draw among, let alone over, files that are not the miniature's.

    Raises:
        PairsError: There is one; the message says how to name the layout of other pair sets.
    """
    strangers = [p.name for p in sorted(folder.glob("[!.]*")) if not _is_miniature(p)]
    if strangers:
        raise PairsError(
            f"pairs.root={folder} has {strangers[0]}, which is not of the miniature, and "
            "pairs=miniature draws its pairs there; for a pair set of your own say its layout "
            "(pairs=pickapic, parquet, jsonl, ...; docs/pairs.md), for the miniature another folder"
        )


def _is_miniature(path: Path) -> bool:
    if not re.fullmatch(r"(train|validation)-\d{5}-of-\d{5}\.parquet", path.name):
        return False
    with _reading(path):
        file = pq.ParquetFile(path)
        if "model_0" not in file.schema_arrow.names:
            return False
        first = next(file.iter_batches(1, columns=["model_0"]), None)
    return first is None or str(first["model_0"][0].as_py()).startswith("miniature/")


def _num_rows(path: Path) -> int:
    with _reading(path):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name a file that is torn, and say how it is drawn again."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise PairsError(
            f"{path} is not a readable Parquet file: {error}; delete it, and the same command "
            "draws it again"
        ) from error
