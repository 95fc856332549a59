"""Settings of a pair set."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Images(Enum):
    """What the image columns of a column map hold."""

    inline = "inline"
    paths = "paths"


@dataclass(kw_only=True, slots=True)
class PairsSpec:
    """Which pairs to label and to train on."""

    kind: str = "pickapic"
    """The files' layout: a module of data/pairs (pickapic, hpdv2, hpdv3, imagereward, parquet,
    jsonl, imagefolder, webdataset, folders, miniature), or one of your own by its full name
    (my_package.my_layout)."""
    root: str = "???"
    """Folder of the pair files, or its URL: hf://datasets/owner/name@commit/folder, s3://..."""
    split: str = "train"
    """The whole name of a split, of files or of their folder; all takes every file, and so does
    empty where the names tell of one split at most."""
    max_pairs: int = 0
    """Take whole shards until at least this many pairs; 0 takes all."""
    image_root: str = ""
    """Folder or URL that image paths are relative to, or that has them in .tar or .zip files; empty
    means root."""
    side_seed: int = 0
    """Decides which of two images becomes image 0, where an order would tell the winner (hpdv3) or
    come from files' names (folders)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our word -> their column, for parquet, jsonl, imagefolder and webdataset; an empty name means
    that there is none."""
    images: Images = Images.inline
    """For parquet and jsonl: encoded bytes (base64 in JSON), or paths below `image_root`."""
    options: dict[str, Any] = field(default_factory=dict)
    """What only one layout has; the miniature's `num_pairs`, or whatever your own reads."""
