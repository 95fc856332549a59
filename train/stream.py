"""Label shards -> this rank's pair batches. The order is computed, not stored.

An epoch's order is a pure function of (label rows, seed, epoch): row groups are permuted, the
rows of `window` row groups are permuted together, the result is dealt in global batches and cut to
whole ones. A position is two numbers, so going on costs nothing and repeats nothing, and every
number of processes sees the same global batches.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from data.images import UnreadableImageError, decode, fit_square
from data.pairs import PairShard, PairSource
from data.shards import ShardError, read_manifest, read_table, verify

COLUMNS = ["pair_id", "prompt", "source", "row", "image_0", "image_1", "winner", "margin"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where training stands in the data: whole global batches done in an epoch."""

    epoch: int = 0
    batches: int = 0


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Pairs for one forward pass, pictures decoded and square."""

    epoch: int
    pair_ids: tuple[str, ...]
    prompts: tuple[str, ...]
    winner: UInt8[Tensor, "pair height width 3"]
    loser: UInt8[Tensor, "pair height width 3"]
    margin: Int[Tensor, " pair"]
    """The winner's lead in votes; below 0 where the votes were overruled."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The unit of reading: one row group of one pair file."""

    shard: PairShard
    index: int
    bytes: int
    """Uncompressed, pictures included."""


@dataclass(frozen=True, slots=True)
class DecidedPairs:
    """The pairs of a label set that have a winner, and where their pictures are."""

    table: pa.Table
    """The columns `COLUMNS`, in the order of the label set."""
    identity: str
    """Of the label set; see `Manifest.identity`."""
    group: np.ndarray
    """Each pair's row group, as index into `groups`."""
    row: np.ndarray
    """Each pair's row in its row group."""
    groups: tuple[RowGroup, ...]
    held_out: "DecidedPairs | None" = None
    """Those of the label set that are kept for validation, and not trained on."""

    def __len__(self) -> int:
        return len(self.row)

    def only(self, indices: np.ndarray) -> "DecidedPairs":
        """Some of them, in the given order."""
        return replace(
            self,
            table=self.table.take(indices),
            group=self.group[indices],
            row=self.row[indices],
        )


# --- what there is -------------------------------------------------------------------------------


def decided_pairs(labels: Path, source: PairSource) -> DecidedPairs:
    """Read the label set and find its decided pairs in the pair files.

    Raises:
        ShardError: There is no complete label set, it is damaged, or the pair files are others.
    """
    manifest = read_manifest(labels, "labels")
    if manifest is None:
        raise ShardError(f"{labels} holds no complete label set; run `make labels` first")
    verify(labels, manifest)
    table = pa.concat_tables([read_table(labels / f.name, COLUMNS) for f in manifest.files])
    table = table.filter(pc.is_valid(table["winner"])).combine_chunks()
    names = table["source"].to_pylist()
    if missing := sorted(set(names) - {shard.name for shard in source.shards}):
        raise ShardError(
            f"{labels} was made from {missing[0]}, which is not under {source.root}; "
            "give the pairs that were labelled (pairs.root=...)"
        )
    group, row, groups = _locate(names, table["row"].to_numpy(), source)
    return DecidedPairs(table, manifest.identity, group, row, groups)


def _locate(
    names: Sequence[str], rows: np.ndarray, source: PairSource
) -> tuple[np.ndarray, np.ndarray, tuple[RowGroup, ...]]:
    """Each pair's row group and its row in it."""
    shards = {shard.name: shard for shard in source.shards}
    groups: list[RowGroup] = []
    group, row = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    named = np.array(names, dtype=object)
    for name in sorted(set(names)):
        found = source.row_groups(shards[name])
        ends = np.cumsum([num_rows for num_rows, _ in found], dtype=np.int64)
        ours = np.flatnonzero(named == name)
        if rows[ours].max() >= (there := int(ends[-1]) if found else 0):
            raise ShardError(
                f"{source.root / name} has {there} rows, but a labelled pair is its row "
                f"{rows[ours].max()}; give the pairs that were labelled (pairs.root=...)"
            )
        inside = np.searchsorted(ends, rows[ours], side="right")
        group[ours] = inside + len(groups)
        row[ours] = rows[ours] - np.concatenate([[0], ends])[inside]
        groups += [RowGroup(shards[name], i, size) for i, (_, size) in enumerate(found)]
    return group, row, tuple(groups)


# --- the order: pure -----------------------------------------------------------------------------


def epoch_order(group: np.ndarray, window: int, key: str) -> np.ndarray:
    """The order in which an epoch visits the pairs, as indices; a pure function of its arguments.

    `group` is each pair's row group. Row groups are permuted; pairs are permuted among those whose
    row groups fall into the same `window` of consecutive ones, so that few are open at a time.
    """
    present, which = np.unique(group, return_inverse=True)
    place = np.empty(len(present), np.int64)
    place[_permutation(len(present), f"{key}/groups")] = np.arange(len(present))
    mixed = _permutation(len(group), f"{key}/rows")
    return mixed[np.argsort((place[which] // window)[mixed], kind="stable")]


def _permutation(length: int, key: str) -> np.ndarray:
    """A permutation named by its key; sorts raw bits, whose stream NumPy promises not to change."""
    seed = int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def share(order: np.ndarray, batch_index: int, batch: int, rank: int, world: int) -> np.ndarray:
    """This rank's part of a global batch: ranks are disjoint, equal, and together the batch."""
    mine = batch // world
    first = batch_index * batch + rank * mine
    return order[first : first + mine]


# --- the stream ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """How pairs become batches; only `seed`, `batch` and `window` decide the order."""

    seed: int
    batch: int
    """Pairs of a global batch."""
    micro_batch: int
    """Pairs of a forward pass on one rank."""
    window: int
    side: int
    """Pixels of the square pictures."""
    rank: int = 0
    world: int = 1
    workers: int = 1
    """Threads that decode; reading is done by the caller's thread."""
    memory_mb: int = 8192
    """Row groups held in memory may take this many MiB on each rank."""


@dataclass(slots=True)
class PairStream:
    """This rank's batches, from any position on, for ever."""

    pairs: DecidedPairs
    source: PairSource
    plan: StreamPlan
    _open: dict[int, pa.Table] = field(default_factory=dict)
    """Row groups in memory."""

    def __post_init__(self) -> None:
        found, plan = len(self.pairs), self.plan
        if found == 0:
            raise ShardError(
                "no pair of the label set has a winner; choose another vote or tie rule "
                "(vote=majority_human), or more pairs"
            )
        if found < plan.batch:
            raise ShardError(
                f"the label set has {found} decided pairs, fewer than one batch; "
                f"set train.batch={plan.batch} to at most {found}, or label more pairs"
            )
        if plan.batch % (plan.micro_batch * plan.world):
            raise ValueError(
                f"train.batch={plan.batch} is no multiple of train.micro_batch={plan.micro_batch} "
                f"x {plan.world} processes; change one of them"
            )
        if self.window_bytes > plan.memory_mb << 20:
            raise ValueError(
                f"train.window={plan.window} row groups of these files take up to "
                f"{self.window_bytes >> 20} MiB on each rank, more than "
                f"train.memory_mb={plan.memory_mb}; lower the window or raise the bound"
            )

    @property
    def epoch_batches(self) -> int:
        """Whole global batches of an epoch; the rest of the pairs waits for the next order."""
        return len(self.pairs) // self.plan.batch

    @property
    def window_bytes(self) -> int:
        """An upper bound of the pair bytes in memory: two windows of the largest row groups."""
        sizes = sorted((group.bytes for group in self.pairs.groups), reverse=True)
        return sum(sizes[: 2 * self.plan.window])

    def after(self, position: Position) -> Position:
        """The position one global batch later."""
        done = position.batches + 1
        if done == self.epoch_batches:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, done)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of the decided pairs."""
        key = f"{self.pairs.identity}/{self.plan.seed}/{epoch}"
        return epoch_order(self.pairs.group, self.plan.window, key)

    def batches(self, position: Position) -> Iterator[PairBatch]:
        """This rank's batches of `micro_batch` pairs from a position on."""
        plan, epoch, order = self.plan, -1, np.empty(0, np.int64)
        last_use = np.zeros(len(self.pairs.groups), np.int64)
        with ThreadPoolExecutor(max(1, plan.workers)) as pool:
            while True:
                if position.epoch != epoch:
                    epoch, order = position.epoch, self.order(position.epoch)
                    last_use[self.pairs.group[order]] = np.arange(len(order))  # the last one stays
                mine = share(order, position.batches, plan.batch, plan.rank, plan.world)
                first = position.batches * plan.batch + plan.rank * len(mine)
                for start in range(0, len(mine), plan.micro_batch):
                    self._close(last_use < first + start)
                    yield self._load(mine[start : start + plan.micro_batch], epoch, pool)
                position = self.after(position)

    def pick(self, indices: np.ndarray) -> PairBatch:
        """Some pairs as one batch, as the first epoch has them; leaves nothing open."""
        with ThreadPoolExecutor(max(1, self.plan.workers)) as pool:
            batch = self._load(indices, 0, pool)
        self._open = {}
        return batch

    def _close(self, past: np.ndarray) -> None:
        """Forget row groups whose last pair in this epoch has passed."""
        self._open = {key: table for key, table in self._open.items() if not past[key]}

    def _load(self, indices: np.ndarray, epoch: int, pool: ThreadPoolExecutor) -> PairBatch:
        labels = self.pairs.table.take(indices).to_pylist()
        contents: list[tuple[bytes, str]] = []
        for label, index in zip(labels, indices, strict=True):
            contents += self._pictures(label, int(index))
        pixels = np.stack(list(pool.map(_square, contents, [self.plan.side] * len(contents))))
        winner_loser = torch.from_numpy(pixels).view(len(indices), 2, *pixels.shape[1:])
        return PairBatch(
            epoch,
            tuple(label["pair_id"] for label in labels),
            tuple(label["prompt"] for label in labels),
            winner_loser[:, 0],
            winner_loser[:, 1],
            torch.tensor([label["margin"] for label in labels]),
        )

    def _pictures(self, label: dict[str, object], index: int) -> list[tuple[bytes, str]]:
        """The encoded winner and loser of a pair, each with a name for messages."""
        key = int(self.pairs.group[index])
        group = self.pairs.groups[key]
        if key not in self._open:
            self._open[key] = self.source.read_row_group(group.shard, group.index)
        pair = self._open[key].slice(int(self.pairs.row[index]), 1).to_pylist()[0]
        where = f"pair {label['pair_id']} (row {label['row']} of {group.shard.name})"
        if (pair["uid_0"], pair["uid_1"]) != (label["image_0"], label["image_1"]):
            raise ShardError(
                f"{where} was labelled with the images {label['image_0']} and {label['image_1']}, "
                f"but the file has {pair['uid_0']} and {pair['uid_1']} there; "
                "give the pairs that were labelled (pairs.root=...), or label again"
            )
        order = (0, 1) if label["winner"] == 0 else (1, 0)
        return [(pair[f"image_{side}"] or b"", f"image {side} of {where}") for side in order]


def _square(content: tuple[bytes, str], side: int) -> np.ndarray:
    encoded, name = content
    try:
        return fit_square(decode(encoded), side)
    except UnreadableImageError as error:
        raise ShardError(
            f"{name} cannot be read any more ({error}), though it was scored; "
            "the pair file, or the picture it names, has changed since it was labelled: label again"
        ) from error
