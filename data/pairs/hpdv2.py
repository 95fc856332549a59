"""HPDv2: JSON lists of choices and rankings, images in a folder or a tar."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from data.pairs.config import PairsSpec
from data.pairs.files import check_names, find_files, open_root
from data.pairs.image_list import ListedPairs, as_listed, listed_pairs
from data.pairs.rankings import Row, ranking_rows, read_entries
from data.storage.base import Store

PREFERENCE = ("prompt", "file_path", "human_preference")
RANKING = ("prompt", "image_path", "rank")


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open `train.json` with one choice of two, or `test.json` with averaged rankings of many.

    Images lie in `train/` and `test/`, or in train.tar and test.tar.
    """
    root = open_root(spec)
    files = find_files(root, spec.split, ".json", deep=False)
    listings = {name: as_listed(_rows(root, name)) for name in files}
    prefixes = ("", *dict.fromkeys(PurePosixPath(name).stem for name in files))
    return listed_pairs(root, spec, listings, prefixes)


def _rows(root: Store, name: str) -> Iterator[Row]:
    """The pairs of an HPDv2 list."""
    entries = read_entries(root, name)
    ranked = bool(entries) and "rank" in entries[0]
    names = RANKING if ranked else PREFERENCE
    if entries:
        check_names(f"{root.url}/{name}, first entry,", names, list(entries[0]))
    for number, entry in enumerate(entries):
        prompt, images, judged = (entry.get(key) for key in names)
        ranks = judged if ranked else _negated(judged)
        yield from ranking_rows(f"{root.url}/{name}, entry {number}", prompt, images, ranks)


def _negated(judged: Any) -> Any:
    """Preferences as ranks: the preferred one, 1, comes first."""
    if not isinstance(judged, list):
        return judged
    return [-value if isinstance(value, (int, float)) else value for value in judged]
