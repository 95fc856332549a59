"""JSON lines with one pair a line, under the same column map as Parquet."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.pairs.column_map import check_human, column_map, in_unit
from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, find_files, open_root, size_of, text_of
from data.pairs.image_list import GROUP_ROWS, LISTED, ListedPairs, cut, listed_pairs
from data.pairs.image_store import ImageStore
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
        try:
            value = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            value = None
        values = value if isinstance(value, dict) else {}
        row = {ours: values.get(self.columns.get(ours, "")) for ours in (*LISTED.names, "known")}
        inline = self.images is Images.inline
        for side, image in enumerate(BLOBS):
            path = text_of(row[image])
            row[image] = _decoded(path) if inline else path
            uid = row[f"uid_{side}"]
            row[f"uid_{side}"] = (None if inline else path) if uid is None else text_of(str(uid))
            row[f"generator_{side}"] = text_of(row[f"generator_{side}"])
        known = row.pop("known") is not False
        row["human"] = row["human"] if known and in_unit(row["human"]) else None
        row["prompt"] = text_of(row["prompt"])
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
    """Find every line once, and check the first ones.

    Raises:
        PairsError: The first line is no object or lacks a key, or a human choice is no number.
    """
    offsets, checked, rows, position = [], [], 0, 0
    with root.open(name) as file:
        for line in file:
            if line.strip():
                if rows % GROUP_ROWS == 0:
                    offsets.append(position)
                if rows < GROUP_ROWS and (columns.get("human") or not rows):
                    checked.append(line)
                rows += 1
            position += len(line)
    if position != size_of(root, name):
        raise StoreError(f"{root.url}/{name} changed while it was read; rerun the same command")
    _check_lines(f"{root.url}/{name}", checked, columns)
    return JsonLines(root, name, columns, images, tuple(offsets), rows)


def _check_lines(path: str, lines: Sequence[bytes], columns: Mapping[str, str]) -> None:
    for number, line in enumerate(lines):
        try:
            value = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as error:
            value = error
        if number == 0:
            if not isinstance(value, dict):
                raise PairsError(f"{path}: the first line is no JSON object ({value})")
            check_names(f"{path}, first line,", columns.values(), list(value))
        if isinstance(value, dict) and "human" in columns:
            check_human(path, columns["human"], [value.get(columns["human"])])


def _decoded(text: str | None) -> bytes | None:
    """Base64, also as a data URI; None when it is not."""
    try:
        return base64.b64decode((text or "").rpartition(",")[2], validate=True) or None
    except (binascii.Error, ValueError):
        return None
