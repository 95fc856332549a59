"""ImageRewardDB: a Parquet table of ranked images, which lie in zip files."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from data.pairs.config import PairsSpec
from data.pairs.files import check_names, find_files, open_root
from data.pairs.image_list import ListedPairs, as_listed, listed_pairs
from data.pairs.image_store import ARCHIVES
from data.pairs.kinds import NAME, RANK, TEXT, check_types
from data.pairs.parquet_file import open_file, read_columns
from data.pairs.rankings import Row, ranking_rows
from data.storage.base import Store

KINDS = {"image_path": TEXT, "prompt_id": NAME, "prompt": TEXT, "rank": RANK}


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open `metadata-<split>.parquet`, one row an image, with the images zipped in `images/`.

    Every prompt's images make pairs; rank 1 is best.
    """
    root = open_root(spec)
    files = find_files(root, spec.split, ".parquet", lead="metadata-")
    listings = {name: as_listed(_rows(root, name)) for name in files}
    folders = dict.fromkeys(PurePosixPath(name).parent.as_posix() for name in files)
    prefixes = dict.fromkeys(["", "images", *folders])
    archives = (*ARCHIVES, "images/*/*.zip")
    return listed_pairs(root, spec, listings, tuple(prefixes), archives=archives)


def _rows(root: Store, name: str) -> Iterator[Row]:
    """The pairs of an ImageRewardDB table, prompt by prompt in order of first appearance."""
    where = f"{root.url}/{name}"
    with open_file(root, name) as file:
        check_names(where, KINDS, file.schema_arrow.names)
        check_types(where, file.schema_arrow, {key: key for key in KINDS}, KINDS)
    table = read_columns(root, name, KINDS)
    prompts: dict[Any, list[dict[str, Any]]] = {}
    for image in table.to_pylist():
        prompts.setdefault(image["prompt_id"], []).append(image)
    for images in prompts.values():
        paths, ranks = ([image[name] for image in images] for name in ("image_path", "rank"))
        if len(images) > 1:  # one image alone is no pair
            yield from ranking_rows(where, images[0]["prompt"], paths, ranks)
