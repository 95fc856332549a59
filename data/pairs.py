"""A pair, and where pairs come from.

Every source yields the same columns (`PAIR`), batch by batch with bounded memory, in the order of
its files. A pair is named by what it is (`pair_key`), not by where it lies. The layouts on disk are
in `columns` (Pick-a-Pic, any Parquet), `lines` (JSON lines) and `rankings` (HPD, ImageRewardDB).
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data.stores import Store, open_store

PAIR = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("uid_0", pa.string()),
        ("uid_1", pa.string()),
        ("human", pa.float32()),
        ("generator_0", pa.string()),
        ("generator_1", pa.string()),
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
    ]
)
"""A pair as every source gives it; `human` is 1 where people preferred image 0, 0 where image 1,
0.5 for a tie, null without a human choice. A generator is the name of the model that made an image,
null where the set does not say. An image that cannot be found is null."""

BLOBS = ("image_0", "image_1")


class PairsKind(Enum):
    """Layouts of pair sets that can be read."""

    pickapic = "pickapic"
    hpdv2 = "hpdv2"
    hpdv3 = "hpdv3"
    imagereward = "imagereward"
    parquet = "parquet"
    jsonl = "jsonl"


class Images(Enum):
    """What the image columns of a column map hold."""

    inline = "inline"
    paths = "paths"


@dataclass(kw_only=True, slots=True)
class PairsSpec:
    """Which pairs to label and to train on."""

    kind: PairsKind = PairsKind.pickapic
    """The files' layout."""
    root: str = "???"
    """Folder of the pair files, or its URL: hf://datasets/owner/name@commit/folder, s3://..."""
    split: str = "train"
    """Files are taken whose name begins with this; empty takes all."""
    miniature_pairs: int = 0
    """Above 0: pairs of the embedded miniature world, drawn into `root` when it is not there."""
    max_pairs: int = 0
    """Take whole shards until at least this many pairs; 0 takes all."""
    image_root: str = ""
    """Folder or URL that image paths are relative to, or that has them in .tar or .zip files; empty
    means root."""
    side_seed: int = 0
    """HPDv3 lists the winner first; this decides which of the two becomes image 0."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our word -> their column, for parquet and jsonl; an empty name means that there is none."""
    images: Images = Images.inline
    """For parquet and jsonl: encoded bytes (base64 in JSON), or paths below `image_root`."""


@dataclass(frozen=True, slots=True)
class PairShard:
    """One file of pairs, or a stretch of one: the unit of work of stage one."""

    index: int
    """Position in the set; its score and label shards have the same number."""
    name: str
    """The file, with `#` and a number for a stretch; `source` in labels."""
    file: str
    """The file's path relative to the set's root."""
    rows: int
    bytes: int
    """Of the whole file."""
    first: int = 0
    """Row of the file where the stretch begins."""
    reading: str = ""
    """What decides the rows apart from the file: its column map, or the seed of its sides."""


@runtime_checkable
class PairSource(Protocol):
    """A pair set that can be read in order and again by row group."""

    @property
    def root(self) -> str:
        """The set's folder, or its URL."""

    @property
    def shards(self) -> tuple[PairShard, ...]:
        """The set in its order."""

    def read(
        self, shard: PairShard, *, images: bool = True, batch_rows: int = 64
    ) -> Iterator[pa.Table]:
        """The shard's pairs in order, `batch_rows` at a time, in the columns of `PAIR`.

        Without `images` the image columns are left out and no picture is read.
        """

    def row_groups(self, shard: PairShard) -> list[tuple[int, int]]:
        """Rows and bytes in memory of each row group: what can be read on its own."""

    def read_row_group(self, shard: PairShard, group: int) -> pa.Table:
        """One whole row group of the shard, in the columns of `PAIR`; rows count from 0 in it."""

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the shard's file: sha256, or an object store's etag."""


ROOT_HINT = (
    "give the folder of the pair files (pairs=pickapic pairs.root=/path/to/pickapic_v2/data), or "
    "its URL (hf://datasets/..., s3://...)"
)


class PairsError(ValueError):
    """The pair set cannot be used; the message says what was found and what is needed."""


def open_pairs(spec: PairsSpec) -> PairSource:
    """Find the pair files and check that they have what is needed, before any weight is loaded.

    Raises:
        StoreError: No such folder, or no way to it.
        PairsError: No files, a missing column, or no rows.
    """
    if spec.miniature_pairs and "://" in spec.root:
        raise PairsError(
            f"pairs.miniature_pairs={spec.miniature_pairs} draws the miniature into pairs.root, "
            f"but {spec.root} is no folder of this machine; say what is there (pairs=pickapic)"
        )
    if spec.miniature_pairs:
        from data.miniature.pairs import ensure_pairs  # the renderer is only for the miniature

        ensure_pairs(Path(spec.root).expanduser(), spec.miniature_pairs)
    root = open_store("pairs.root", spec.root, ROOT_HINT)
    source = _open_kind(root, spec)
    if not sum(shard.rows for shard in source.shards):
        raise PairsError(f"the files of split {spec.split!r} under {spec.root} hold no pairs")
    return source


def _open_kind(root: Store, spec: PairsSpec) -> PairSource:
    from data import columns, lines, rankings  # they build on this module

    match spec.kind:
        case PairsKind.pickapic:
            return columns.open_pickapic(root, spec)
        case PairsKind.parquet:
            return columns.open_parquet(root, spec)
        case PairsKind.jsonl:
            return lines.open_jsonl(root, spec)
        case PairsKind.hpdv2:
            return rankings.open_hpdv2(root, spec)
        case PairsKind.hpdv3:
            return rankings.open_hpdv3(root, spec)
        case PairsKind.imagereward:
            return rankings.open_imagereward(root, spec)


# --- for the layouts -----------------------------------------------------------------------------


def find_files(root: Store, prefix: str, suffix: str, *, deep: bool = True) -> list[str]:
    """The files of a split, sorted by path.

    Raises:
        PairsError: There is none; names some that are there.
    """
    every = root.names(f"**/*{suffix}" if deep else f"*{suffix}")
    files = [name for name in every if PurePosixPath(name).name.startswith(prefix)]
    if not files:
        others = sorted({PurePosixPath(name).name for name in every})[:3]
        kind = {".parquet": "Parquet", ".json": "JSON"}.get(suffix, suffix)
        found = f"it has {', '.join(others)}" if others else f"it has no {kind} file at all"
        raise PairsError(f"no {prefix}*{suffix} under pairs.root={root.url}; {found}")
    return files


def size_of(root: Store, name: str) -> int:
    """Bytes of a file that was listed.

    Raises:
        PairsError: It is gone.
    """
    size = root.size(name)
    if size is None:
        raise PairsError(f"{root.url}/{name} was there a moment ago; run the same command again")
    return size


def check_names(where: str, wanted: Iterable[str], found: Sequence[str]) -> None:
    """Refuse a file that lacks a column or key.

    Raises:
        PairsError: Names what is missing, the nearest match, and what there is.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], found, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PairsError(
            f"{where} lacks the columns {', '.join(missing)}; {hint}it has {', '.join(found)}"
        )


def text_of(value: Any) -> str | None:
    """The string, or None for anything that is none; surrogates, which Arrow refuses, become ?."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


# --- names ---------------------------------------------------------------------------------------


def image_key(content: bytes) -> bytes:
    """Names an image by its bytes: uids differ between mirrors and say nothing of equality."""
    return hashlib.blake2b(content, digest_size=16).digest()


def pair_key(image_0: bytes, image_1: bytes, prompt: str) -> str:
    """Names a pair by its two image keys, in their order, and its prompt; 32 hexadecimal digits.

    `pair_id` is this key and `-n`, the how-manieth equal pair it is: independent of paths and of
    the order of files.
    """
    parts = hashlib.blake2b(image_0 + image_1, digest_size=16)
    parts.update(prompt.encode("utf-8", "surrogatepass"))
    return parts.hexdigest()
