"""A pair set with pairs of other sets mixed in: whole prompts of them, drawn by a seed.

Nothing is copied. The set's own files are read as they are; of the others' files, the rows of the
prompts that were drawn.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
import pyarrow as pa

from data.pairs import open_pairs
from data.pairs.config import Images, PairsSpec
from data.pairs.schema import PairsError, PairShard, PairSource
from data.storage.paths import user_path

OPTIONS = ("kind", "fraction", "others", "seed")
"""What it reads of `pairs.options`."""
READ_ROWS = 8192
"""Prompts read at a time to draw from them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A shard of the mixture, as the set that it comes from knows it."""

    source: PairSource
    shard: PairShard
    rows: np.ndarray | None = None
    """The shard's rows that are part of the mixture, in order; None for all."""


@dataclass(frozen=True, slots=True)
class MixedPairs:
    """Several pair sets as one; implements `PairSource`."""

    root: str
    """The folder of the set's own pairs."""
    shards: tuple[PairShard, ...]
    parts: tuple[Part, ...]
    """What each shard is a part of."""

    def read(
        self, shard: PairShard, *, images: bool = True, batch_rows: int = 64
    ) -> Iterator[pa.Table]:
        """The shard's pairs in order, at most `batch_rows` at a time, in the columns of `PAIR`."""
        part = self.parts[shard.index]
        tables = part.source.read(part.shard, images=images, batch_rows=batch_rows)
        if part.rows is None:
            yield from tables
            return
        first = done = 0
        for table in tables:
            drawn = _among(part.rows, first, table.num_rows)
            first += table.num_rows
            if len(drawn):
                yield _numbered(table.take(drawn), done)
                done += len(drawn)

    def row_groups(self, shard: PairShard) -> list[tuple[int, int]]:
        """Rows and bytes of each group that has rows of the mixture; bytes in proportion."""
        part = self.parts[shard.index]
        groups = part.source.row_groups(part.shard)
        if part.rows is None:
            return groups
        return [
            (len(drawn), groups[group][1] * len(drawn) // groups[group][0])
            for group, drawn in _drawn_by_group(part)
        ]

    def read_row_group(self, shard: PairShard, group: int) -> pa.Table:
        """One group's rows of the mixture, in the columns of `PAIR`; rows count from 0 in it."""
        part = self.parts[shard.index]
        if part.rows is None:
            return part.source.read_row_group(part.shard, group)
        inner, drawn = _drawn_by_group(part)[group]
        return _numbered(part.source.read_row_group(part.shard, inner).take(drawn), 0)

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the file that the shard's pairs come from."""
        part = self.parts[shard.index]
        return part.source.fingerprint(part.shard)


def open_layout(spec: PairsSpec) -> MixedPairs:
    """Open the set at `pairs.root`, in the layout `pairs.options.kind`, and mix in the others.

    `pairs.options.others` is a list of pair sets with the settings of `pairs`; together they give
    `pairs.options.fraction` of all pairs.

    Raises:
        PairsError: An option is missing or cannot be, or the others have too few pairs.
    """
    kind, fraction, others, seed = _options(spec)
    _refuse_repeated([spec, *others])
    own = open_pairs(PairsSpec(**_as_options(spec) | {"kind": kind, "options": {}}))
    num_own = sum(shard.rows for shard in own.shards)
    wanted = round(fraction / (1 - fraction) * num_own)
    drawn = _draw([open_pairs(other) for other in others], wanted, seed)
    if (count := sum(len(part.rows) for _, part in drawn if part.rows is not None)) < wanted:
        most = count / (count + num_own)
        raise PairsError(
            f"pairs.options.fraction={fraction:.6g} of a mixture with {num_own} pairs of "
            f"{spec.root} takes {wanted} pairs of pairs.options.others, which have {count}; lower "
            f"it to {most:.3g} or less, or add another set"
        )
    shards, parts = list(own.shards), [Part(own, shard) for shard in own.shards]
    for number, part in drawn:
        shards.append(_renamed(part, len(shards), number))
        parts.append(part)
    return MixedPairs(own.root, tuple(shards), tuple(parts))


# --- options -------------------------------------------------------------------------------------


def _options(spec: PairsSpec) -> tuple[str, float, list[PairsSpec], int]:
    """Kind, fraction, the other sets and the seed.

    Raises:
        PairsError: One is missing, of another type, or cannot be.
    """
    kind, fraction = spec.options.get("kind", "pickapic"), spec.options.get("fraction")
    others, seed = spec.options.get("others"), spec.options.get("seed", 0)
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise PairsError(
            f"pairs.options.fraction={fraction}; it is the fraction of all pairs that others give, "
            "above 0 and below 1"
        )
    if not isinstance(others, list) or not others:
        raise PairsError(
            f"pairs.options.others={others}; it is a list of pair sets, as "
            "'pairs.options.others=[{kind: pickapic, root: /data/pickapic_v2/data}]'"
        )
    if not isinstance(seed, int) or kind == "mixture":
        raise PairsError(
            f"pairs.options.seed={seed} and pairs.options.kind={kind}; the seed is a whole number, "
            "and the kind a layout but mixture"
        )
    return str(kind), float(fraction), [_pairs_spec(n, x) for n, x in enumerate(others)], seed


def _pairs_spec(number: int, values: Any) -> PairsSpec:
    """An entry of `pairs.options.others`."""
    where, names = f"pairs.options.others[{number}]", [item.name for item in fields(PairsSpec)]
    if not isinstance(values, dict) or not isinstance(values.get("root"), str):
        raise PairsError(f"{where} is {values}; it needs kind and root, as those of pairs")
    for name, value in values.items():
        if name not in names:
            raise PairsError(f"{where} has the setting {name}; allowed: {', '.join(names)}")
        wanted = type(getattr(PairsSpec(), name))
        if name != "images" and type(value) is not wanted:
            raise PairsError(f"{where} has {name}={value!r}; needed is a {wanted.__name__}")
    try:
        images = Images(values.get("images", Images.inline))
    except ValueError as error:
        raise PairsError(f"{where}: {error}; allowed are inline and paths") from error
    return PairsSpec(**values | {"images": images})


def _refuse_repeated(specs: Sequence[PairsSpec]) -> None:
    """Refuse a set that is mixed with itself: its copies would count as other pairs."""
    sets = [(_location(spec.root), spec.split) for spec in specs]
    for number, (root, split) in enumerate(sets[1:]):
        if (root, split) in sets[: number + 1]:
            raise PairsError(
                f"pairs.options.others[{number}] is split {split!r} of {root}, which the mixture "
                "has already; name each set once"
            )


def _location(root: str) -> str:
    return root if "://" in root else str(user_path(root).resolve())


def _as_options(spec: PairsSpec) -> dict[str, Any]:
    return {item.name: getattr(spec, item.name) for item in fields(PairsSpec)}


# --- drawing -------------------------------------------------------------------------------------


def _draw(sources: Sequence[PairSource], wanted: int, seed: int) -> list[tuple[int, Part]]:
    """Parts with the rows of as many prompts as give the wanted number of pairs, and their set.

    The prompts of all sets are put into an order that follows from the seed, and taken from its
    start; a prompt's pairs stay together.
    """
    prompts = [
        (number, shard, _prompts_of(source, shard))
        for number, source in enumerate(sources)
        for shard in source.shards
    ]
    counts: dict[tuple[int, str], int] = {}
    for number, _, texts in prompts:
        for text in texts:
            counts[number, text] = counts.get((number, text), 0) + 1
    chosen, total = set[tuple[int, str]](), 0
    for key in sorted(counts, key=lambda key: _place(seed, *key)):
        if total >= wanted:
            break
        chosen.add(key)
        total += counts[key]
    parts = []
    for number, shard, texts in prompts:
        rows = np.flatnonzero([(number, text) in chosen for text in texts])
        if len(rows):
            parts.append((number, Part(sources[number], shard, rows)))
    return parts


def _prompts_of(source: PairSource, shard: PairShard) -> list[str]:
    tables = source.read(shard, images=False, batch_rows=READ_ROWS)
    return [text or "" for table in tables for text in table["prompt"].to_pylist()]


def _place(seed: int, number: int, prompt: str) -> bytes:
    """Where a prompt stands in the order of its seed: a hash, as good as random."""
    text = f"{seed}/{number}/{prompt}".encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=16).digest()


def _renamed(part: Part, index: int, number: int) -> PairShard:
    """A part as a shard of the mixture; its rows belong to what decides it."""
    assert part.rows is not None
    inner = part.shard
    digest = sha256(json.dumps(part.rows.tolist()).encode()).hexdigest()[:16]
    return PairShard(
        index=index,
        name=f"others.{number}/{inner.name}",
        file=inner.file,
        rows=len(part.rows),
        bytes=inner.bytes,
        reading=f"{inner.reading}; {len(part.rows)} rows {digest}".removeprefix("; "),
    )


# --- rows ----------------------------------------------------------------------------------------


def _among(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    """Those of the rows that are among `count` rows from `first` on, counted from there."""
    start, end = np.searchsorted(rows, [first, first + count])
    return np.asarray(rows[start:end] - first)


def _drawn_by_group(part: Part) -> list[tuple[int, np.ndarray]]:
    """Each row group that has drawn rows, with these, counted from its start."""
    assert part.rows is not None
    drawn, first = [], 0
    for group, (size, _) in enumerate(part.source.row_groups(part.shard)):
        if len(rows := _among(part.rows, first, size)):
            drawn.append((group, rows))
        first += size
    return drawn


def _numbered(table: pa.Table, first: int) -> pa.Table:
    """The table with its rows counted from `first`."""
    numbers = pa.array(range(first, first + table.num_rows), pa.int64())
    return table.set_column(table.schema.get_field_index("row"), "row", numbers)
