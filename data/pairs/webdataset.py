"""WebDataset: tars in which the members of one key, the name up to its first dot, are a pair.

`0001.txt`, `0001.0.jpg` and `0001.1.jpg` are the pair 0001. Tars are read in place, and texts where
they are needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data.pairs.column_map import column_map
from data.pairs.config import Images, PairsSpec
from data.pairs.files import check_names, find_files, open_root
from data.pairs.image_list import LISTED, ListedPairs, cut
from data.pairs.image_store import NUM_TRIED, ImageStore
from data.pairs.jsonl import parsed
from data.pairs.kinds import CHOICE, FLAG, json_value, kinds_of
from data.pairs.schema import BLOBS, PairsError
from data.storage.archives import Place, listed
from data.storage.base import Store

IN_JSON = "json."
"""Begins the name of a key in a pair's member `json`."""

Sample = dict[str, Place]
"""The members of a key, by what follows its dot."""


@dataclass(frozen=True, slots=True)
class TarPairs:
    """The pairs of a tar."""

    store: Store
    tar: str
    columns: Mapping[str, str]
    """Our word -> a member, or a key of the member `json`."""
    samples: tuple[tuple[str, Sample], ...]
    """Key and members, in the order of the tar."""

    @property
    def num_rows(self) -> int:
        """Pairs in the tar."""
        return len(self.samples)

    def rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Consecutive pairs in the columns of `LISTED`; what a pair lacks is null."""
        return [self._row(key, members) for key, members in self.samples[first : first + count]]

    def _row(self, key: str, members: Sample) -> dict[str, Any]:
        where, values = f"{self.store.url}/{self.tar}, pair {key}", self._values(members)
        row: dict[str, Any] = dict.fromkeys(LISTED.names)
        for side, image in enumerate(BLOBS):
            if self.columns[image] in members:
                row[image] = row[f"uid_{side}"] = f"{self.tar}/{key}.{self.columns[image]}"
        kinds = kinds_of(Images.paths)
        for word, name in self.columns.items():
            if word not in BLOBS and (value := values.get(name)) is not None:
                row[word] = json_value(where, f"{name!r}", value, kinds[word])
        if not row.pop("known", True):
            row["human"] = None
        return row

    def _values(self, members: Sample) -> dict[str, Any]:
        """The values of the members that are no images, and of the keys of the member `json`."""
        values: dict[str, Any] = {}
        names = [name for word, name in self.columns.items() if word not in BLOBS]
        if any(name.startswith(IN_JSON) for name in names) and "json" in members:
            content = parsed(self._read(members["json"]))
            for name, value in content.items() if isinstance(content, dict) else ():
                values[f"{IN_JSON}{name}"] = value
        for word, name in self.columns.items():
            if name in members and word not in BLOBS:
                values[name] = _plain(self._read(members[name]), word)
        return values

    def _read(self, place: Place) -> bytes:
        return self.store.read(place.file, place.offset, place.bytes)


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open the tars of a split.

    Raises:
        PairsError: A tar's first pair lacks a member or a key.
    """
    if spec.image_root:
        raise PairsError("pairs=webdataset has its images in the tars; leave pairs.image_root out")
    root = open_root(spec)
    columns, reading = column_map(spec)
    listings: dict[str, TarPairs] = {}
    images: dict[str, Place] = {}
    for name in find_files(root, spec.split, ".tar"):
        places = dict(listed(root, name))
        images |= {f"{name}/{member}": place for member, place in places.items()}
        listings[name] = TarPairs(root, name, columns, _samples(places))
        _check_first(root, listings[name])
    return ListedPairs(
        root, cut(root, listings, spec, reading), listings, ImageStore(root, ("",), images)
    )


def _samples(places: Mapping[str, Place]) -> tuple[tuple[str, Sample], ...]:
    """The members by key."""
    samples: dict[str, Sample] = {}
    for name, place in places.items():
        path = PurePosixPath(name)
        stem, _, member = path.name.partition(".")
        samples.setdefault(path.with_name(stem).as_posix() if stem else name, {})[member] = place
    return tuple(samples.items())


def _check_first(root: Store, pairs: TarPairs) -> None:
    """Refuse a tar whose first pair lacks a member or a key, or has one of another type."""
    if not pairs.samples:
        return
    key, members = pairs.samples[0]
    where = f"{root.url}/{pairs.tar}, pair {key},"
    value = parsed(root.read(m.file, m.offset, m.bytes)) if (m := members.get("json")) else None
    keys = [f"{IN_JSON}{name}" for name in value] if isinstance(value, dict) else []
    check_names(where, pairs.columns.values(), [*members, *keys])
    pairs.rows(0, NUM_TRIED)


def _plain(content: bytes, word: str) -> Any:
    """The value of a member of its own: text, or the number that a choice is written as."""
    text = content.decode("utf-8-sig", "replace").strip()
    if kinds_of(Images.paths)[word] not in (CHOICE, FLAG):
        return text
    value = parsed(content.strip())
    return value if isinstance(value, int | float) else text
