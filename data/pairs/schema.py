"""A pair: the columns that every layout yields, and the hash that names it.

Every source yields the same columns (`PAIR`), batch by batch with bounded memory, in the order of
its files. A pair is named by what it is (`pair_key`), not by where it lies.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa

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
null where the set does not say. An image that is missing is null."""


BLOBS = ("image_0", "image_1")


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
    """Size of the whole file."""
    first: int = 0
    """Row of the file where the stretch begins."""
    reading: str = ""
    """What decides the rows apart from the file: its column map, or the seed of its sides."""


@runtime_checkable
class PairSource(Protocol):
    """A pair set that can be read in order, and again by row group; what a layout opens."""

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

        Without `images` the image columns are left out and no image is read.
        """

    def row_groups(self, shard: PairShard) -> list[tuple[int, int]]:
        """Rows and bytes in memory of each row group: what can be read on its own."""

    def read_row_group(self, shard: PairShard, group: int) -> pa.Table:
        """One whole row group of the shard, in the columns of `PAIR`; rows count from 0 in it."""

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """What names the content of the shard's file: sha256, or an object store's etag."""


class PairsError(ValueError):
    """The pair set cannot be used; the message says what there is and what is needed."""


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
