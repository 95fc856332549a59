"""Image folders of Hugging Face's `datasets`: images beside a metadata.csv or metadata.jsonl.

A row is a pair, with two columns of file names, or an image, with one: then each two images of a
prompt are a pair, judged by a rank where there is one.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import csv

from data.pairs.config import PairsSpec
from data.pairs.files import check_names, open_root, refuse_mixed, shortened
from data.pairs.image_list import ListedPairs, as_listed, listed_pairs
from data.pairs.jsonl import parsed
from data.pairs.kinds import CHOICE, RANK, TEXT, json_value, shown
from data.pairs.rankings import Row, better, is_swapped
from data.pairs.schema import PairsError
from data.pairs.splits import files_of_split, splits_of
from data.storage.base import Store

METADATA = ("metadata.csv", "metadata.jsonl")
KINDS = {
    "prompt": TEXT, "image": TEXT, "rank": RANK, "image_0": TEXT, "image_1": TEXT, "human": CHOICE,
}  # fmt: skip
"""Our words: `image` and `rank` (1 is best) of a row that is an image, the rest of a pair."""

Values = dict[str, Any]
"""Our word -> a row's value, or null."""


def open_layout(spec: PairsSpec) -> ListedPairs:
    """Open the metadata files of a split, with the images where they say.

    Raises:
        PairsError: There is no metadata, a column is missing, or a prompt has a single image.
    """
    root, columns = open_root(spec), _columns(spec)
    files = _files(root, spec.split)
    listings = {name: as_listed(_rows(root, name, columns, spec.side_seed)) for name in files}
    reading = json.dumps({"columns": columns, "sides": spec.side_seed}, sort_keys=True)
    return listed_pairs(root, spec, listings, reading=reading)


def _columns(spec: PairsSpec) -> dict[str, str]:
    if unknown := [word for word in spec.columns if word not in KINDS]:
        raise PairsError(
            f"pairs.columns has {unknown[0]}; allowed: {', '.join(KINDS)} (our word -> column)"
        )
    return {word: name for word, name in spec.columns.items() if name}


def _files(root: Store, split: str) -> list[str]:
    every = [name for one in METADATA for name in (*root.names(one), *root.names(f"**/{one}"))]
    every = sorted(dict.fromkeys(every))
    if not split:
        refuse_mixed(f"pairs.root={root.url}", "pairs.split", splits_of(every))
    files = files_of_split(every, split, PurePosixPath(root.url).name)
    folders = [PurePosixPath(name).parent for name in files]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise PairsError(f"{root.url}/{twice[0]} has {' and '.join(METADATA)}; keep one of them")
    if not files:
        there = f"it has {shortened(every)}" if every else "there is none at all"
        raise PairsError(
            f"no {' or '.join(METADATA)} of split {split!r} under pairs.root={root.url}; {there}"
        )
    return files


def _rows(root: Store, name: str, columns: dict[str, str], seed: int) -> Iterator[Row]:
    """The pairs of a metadata file; paths in it are relative to its own folder."""
    folder, where = PurePosixPath(name).parent, f"{root.url}/{name}"
    names, values = (_csv if name.endswith(".csv") else _json_lines)(root, name, columns)
    is_pair = all(columns.get(word) in names for word in ("image_0", "image_1"))
    if not is_pair and columns.get("image") not in names:
        raise PairsError(
            f"{where} has neither {columns.get('image_0')} and {columns.get('image_1')} (a pair a "
            f"row) nor {columns.get('image')} (an image a row); it has {shortened(names)}: name "
            "its columns in pairs.columns"
        )
    other = ("image", "rank") if is_pair else ("image_0", "image_1", "human")
    check_names(where, [column for word, column in columns.items() if word not in other], names)

    def path(value: str | None) -> str | None:
        return (folder / value).as_posix() if value else None

    if is_pair:
        for row in values:
            yield row["prompt"], path(row["image_0"]), path(row["image_1"]), row.get("human")
        return
    for row in values:
        row["image"] = path(row["image"])
    yield from _pairs(where, values, seed)


def _pairs(where: str, rows: Sequence[Values], seed: int) -> Iterator[Row]:
    """Each two images of a prompt, on sides that are drawn: their order may tell the winner."""
    prompts: dict[str | None, list[Values]] = {}
    for row in rows:
        prompts.setdefault(row["prompt"], []).append(row)
    if alone := [images[0] for images in prompts.values() if len(images) == 1]:
        raise PairsError(
            f"{where}: the prompt {shown(alone[0]['prompt'])} has one image, {alone[0]['image']}, "
            f"and a pair needs two (as {len(alone)} of {len(prompts)} prompts); add an image, or "
            "remove the row"
        )
    for prompt, images in prompts.items():
        for left, right in combinations(images, 2):
            swap = is_swapped(seed, str(left["image"]), str(right["image"]))
            one, two = (right, left) if swap else (left, right)
            yield prompt, one["image"], two["image"], better(one.get("rank"), two.get("rank"))


def _csv(root: Store, name: str, columns: dict[str, str]) -> tuple[list[str], list[Values]]:
    """The columns' names, and the rows; text stays text, whatever it looks like."""
    where = f"{root.url}/{name}"
    texts = {column: pa.string() for word, column in columns.items() if KINDS[word] is TEXT}
    try:
        with root.open(name) as file:
            table = csv.read_csv(
                file,
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=texts),
            )
    except pa.ArrowInvalid as error:
        root.refuse_pointer(name)
        raise PairsError(f"{where} is no table of comma-separated values: {error}") from error
    there = {word: column for word, column in columns.items() if column in table.column_names}
    rows = table.select(list(dict.fromkeys(there.values()))).to_pylist()
    return table.column_names, [_typed(where, i, row, there) for i, row in enumerate(rows, 2)]


def _json_lines(root: Store, name: str, columns: dict[str, str]) -> tuple[list[str], list[Values]]:
    """The keys of the first line, and the rows."""
    where, names, rows = f"{root.url}/{name}", list[str](), list[Values]()
    with root.open(name) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            value = parsed(line)
            if not isinstance(value, dict):
                root.refuse_pointer(name)
                raise PairsError(f"{where}, line {number} is no JSON object ({shown(value)})")
            names = names or list(value)
            rows.append(_typed(where, number, value, columns))
    return names, rows


def _typed(where: str, line: int, row: Values, columns: dict[str, str]) -> Values:
    return {
        word: json_value(f"{where}, line {line}", f"{column!r}", row.get(column), KINDS[word])
        for word, column in columns.items()
    }
