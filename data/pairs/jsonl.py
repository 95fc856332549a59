"""JSON lines with one pair a line, under the same column map as Parquet."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.pairs.column_map import column_map
from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, find_files, open_root, size_of
from data.pairs.image_list import GROUP_ROWS, LISTED, ListedPairs, cut, listed_pairs
from data.pairs.image_store import NUM_TRIED, ImageStore
from data.pairs.kinds import Kind, json_value, kinds_of, shown
from data.pairs.schema import BLOBS, PairsError
from data.storage.base import Store, StoreError


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file of JSON lines, read where it is needed: inline images may be many gigabytes."""

    store: Store
    file: str
    columns: Mapping[str, str]
    images: Images
    offsets: tuple[int, ...]
    """Where every `GROUP_ROWS`-th line begins; empty lines do not count."""
    num_rows: int

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Consecutive pairs in the columns of `LISTED`; a line that is no pair has only nulls."""
        if not count:
            return []
        with self.store.open(self.file) as file:
            file.seek(self.offsets[first // GROUP_ROWS])
            skipped = first % GROUP_ROWS
            lines = islice((line for line in file if line.strip()), skipped, skipped + count)
            return [self._row(line) for line in lines]

    def _row(self, line: bytes) -> dict[str, Any]:
        where = f"{self.store.url}/{self.file}"
        row: dict[str, Any] = dict.fromkeys(LISTED.names)
        row |= typed_values(where, parsed(line), self.columns, kinds_of(self.images))
        inline = self.images is Images.inline
        for side, image in enumerate(BLOBS):
            if not inline and row[f"uid_{side}"] is None:
                row[f"uid_{side}"] = row[image]
            row[image] = _decoded(row[image]) if inline else row[image]
        if not row.pop("known", True):
            row["human"] = None
        return row


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open JSON lines whose images are in base64, or named by path."""
    root = open_root(spec)
    columns, reading = column_map(spec)
    listings = {
        name: _indexed(root, name, columns, spec.images)
        for name in find_files(root, spec.split, ".jsonl")
    }
    if spec.images is Images.inline:
        return ListedPairs(root, cut(root, listings, spec, reading), listings, ImageStore(root))
    return listed_pairs(root, spec, listings, reading=reading)


def _indexed(root: Store, name: str, columns: Mapping[str, str], images: Images) -> JsonLines:
    """Find every line once, and check what it holds.

    Raises:
        PairsError: The first line is no object or lacks a key, or a value has another type.
    """
    where, kinds = f"{root.url}/{name}", kinds_of(images)
    offsets, rows, position, tried = [], 0, 0, list[str | None]()
    with root.open(name) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                if not rows:
                    _check_first(root, name, line, columns)
                if rows % GROUP_ROWS == 0:
                    offsets.append(position)
                values = typed_values(f"{where}, line {number}", parsed(line), columns, kinds)
                if rows < NUM_TRIED:
                    tried += [values[image] for image in BLOBS if values[image]]
                rows += 1
            position += len(line)
    if images is Images.inline and tried and not any(map(_decoded, tried)):
        raise PairsError(
            f"{where}: none of the first images is base64, for example {shown(tried[0])}; set "
            "pairs.images=paths if they are paths"
        )
    if position != size_of(root, name):
        raise StoreError(f"{where} changed while it was read; rerun the same command")
    return JsonLines(root, name, columns, images, tuple(offsets), rows)


def _check_first(root: Store, name: str, line: bytes, columns: Mapping[str, str]) -> None:
    value = parsed(line)
    if not isinstance(value, dict):
        root.refuse_pointer(name)
        raise PairsError(f"{root.url}/{name}: the first line is no JSON object ({shown(value)})")
    check_names(f"{root.url}/{name}, first line,", columns.values(), list(value))


def parsed(line: bytes) -> Any:
    """A line's JSON value, or the error that it gives."""
    try:
        return json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        return error


def typed_values(
    where: str, value: Any, columns: Mapping[str, str], kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """Our word -> its value in a line's object; nothing but nulls where the line holds none.

    Raises:
        PairsError: A value has another type, or is outside its range; begins with `where`.
    """
    values = value if isinstance(value, dict) else {}
    return {
        ours: json_value(where, f"{key!r}", values.get(key), kinds[ours])
        for ours, key in columns.items()
    }


def _decoded(text: str | None) -> bytes | None:
    """Base64, also as a data URI; None when it is not."""
    try:
        return base64.b64decode((text or "").rpartition(",")[2], validate=True) or None
    except (binascii.Error, ValueError):
        return None
