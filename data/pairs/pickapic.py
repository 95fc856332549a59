"""Pick-a-Pic v1 and v2: Parquet files with the images in them."""

from data.pairs.config import PairsSpec
from data.pairs.files import find_files, open_root
from data.pairs.parquet_pairs import ParquetPairs, checked_footers, parquet_pairs

COLUMNS = {
    "prompt": "caption",
    "uid_0": "image_0_uid",
    "uid_1": "image_1_uid",
    "image_0": "jpg_0",
    "image_1": "jpg_1",
    "human": "label_0",
    "known": "has_label",
    "generator_0": "model_0",
    "generator_1": "model_1",
}
"""Our word -> the column of Pick-a-Pic v1 and v2 (facts: `jpg_0` may hold a PNG)."""
NEEDED = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1")
"""`has_label` is absent from some mirrors."""


def open_layout(spec: PairsSpec) -> ParquetPairs:
    """Open Parquet files in the schema of Pick-a-Pic v1 and v2."""
    root = open_root(spec)
    files = find_files(root, spec.split, ".parquet")
    return parquet_pairs(root, checked_footers(root, files, spec, COLUMNS, NEEDED), COLUMNS)
