"""The map from our words to the columns or keys of `parquet` and `jsonl` files."""

import json

from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError

NEEDED = ("prompt", "image_0", "image_1")
OPTIONAL = ("uid_0", "uid_1", "human", "known", "generator_0", "generator_1")
"""`human` is 1 for image 0, 0 for image 1, between for a tie; where `known` is false, nobody chose.
Without a uid an image is named by its path, or by its bytes."""


def column_map(spec: PairsSpec) -> tuple[dict[str, str], str]:
    """The map without its empty names, and the text of what decides the rows.

    Raises:
        PairsError: A word is not ours, or one that is needed has no column.
    """
    columns = {ours: name for ours, name in spec.columns.items() if name}
    allowed = (*NEEDED, *OPTIONAL)
    if unknown := [word for word in spec.columns if word not in allowed]:
        raise PairsError(
            f"pairs.columns has {unknown[0]}; allowed: {', '.join(allowed)} (our word -> column)"
        )
    if missing := [word for word in NEEDED if word not in columns]:
        raise PairsError(f"pairs.columns names no column for {', '.join(missing)}")
    return columns, json.dumps({"columns": columns, "images": spec.images.value}, sort_keys=True)
