"""HPDv3: JSON lists of winners and losers, images in a folder or a tar."""

from collections.abc import Iterator
from hashlib import blake2b

from data.pairs.config import PairsSpec
from data.pairs.files import check_names, find_files, open_root
from data.pairs.image_list import ListedPairs, as_listed, listed_pairs
from data.pairs.kinds import TEXT, json_value
from data.pairs.rankings import Row, read_entries
from data.storage.base import Store

NEEDED = ("prompt", "path1", "path2")


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open lists whose path1 was always preferred: sides are drawn, or position bias would hide."""
    root = open_root(spec)
    files = find_files(root, spec.split, ".json", deep=False)
    listings = {name: as_listed(_rows(root, name, spec.side_seed)) for name in files}
    return listed_pairs(root, spec, listings, reading=f"sides by seed {spec.side_seed}")


def _rows(root: Store, name: str, seed: int) -> Iterator[Row]:
    """The pairs of an HPDv3 list, each winner on the side that (seed, row) says."""
    entries = read_entries(root, name)
    if entries:
        check_names(f"{root.url}/{name}, first entry,", NEEDED, list(entries[0]))
    for row, entry in enumerate(entries):
        where = f"{root.url}/{name}, entry {row}"
        values = (json_value(where, key, entry.get(key), TEXT) for key in NEEDED)
        prompt, winner, loser = values
        swapped = blake2b(f"{seed}/{row}".encode(), digest_size=1).digest()[0] & 1
        yield (prompt, loser, winner, 0.0) if swapped else (prompt, winner, loser, 1.0)
