"""A pair, and where pairs come from.

Every source yields the same columns (`PAIR`), batch by batch with bounded memory, in the order of
its files. A pair is named by what it is (`pair_key`), not by where it lies. The layouts on disk are
in `columns` (Pick-a-Pic, any Parquet), `lines` (JSON lines) and `rankings` (HPD, ImageRewardDB).
"""

from pathlib import Path

from data.pairs.config import PairsKind, PairsSpec
from data.pairs.schema import PairsError, PairSource
from data.storage import open_store
from data.storage.base import Store

ROOT_HINT = (
    "give the folder of the pair files (pairs=pickapic pairs.root=/path/to/pickapic_v2/data), or "
    "its URL (hf://datasets/..., s3://...)"
)


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
    from data.pairs import jsonl, parquet, rankings  # they build on this module

    match spec.kind:
        case PairsKind.pickapic:
            return parquet.open_pickapic(root, spec)
        case PairsKind.parquet:
            return parquet.open_parquet(root, spec)
        case PairsKind.jsonl:
            return jsonl.open_jsonl(root, spec)
        case PairsKind.hpdv2:
            return rankings.open_hpdv2(root, spec)
        case PairsKind.hpdv3:
            return rankings.open_hpdv3(root, spec)
        case PairsKind.imagereward:
            return rankings.open_imagereward(root, spec)
