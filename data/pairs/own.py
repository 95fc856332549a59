"""Generated pairs (`make pairs`): files in Pick-a-Pic's schema with a manifest beside them."""

from pathlib import Path

from data.artifacts.manifest import MANIFEST, read_manifest
from data.pairs import pickapic
from data.pairs.config import PairsSpec
from data.pairs.files import open_root
from data.pairs.parquet_pairs import ParquetPairs
from data.pairs.schema import PairsError
from data.storage.paths import user_path

KIND = "own_pairs"
"""What the manifest says that the set is."""


def open_layout(spec: PairsSpec) -> ParquetPairs:
    """Open a complete set of generated pairs.

    Raises:
        PairsError: It is not complete, or a file of it is missing or was changed.
    """
    if "://" in spec.root:
        raise PairsError(
            f"pairs=own reads what `make pairs` wrote on this machine, but pairs.root={spec.root} "
            "is a URL; read a copy elsewhere with pairs=pickapic"
        )
    folder = user_path(spec.root, "pairs.root")
    manifest = read_manifest(folder, KIND)
    if manifest is None:
        raise PairsError(
            f"pairs.root={folder} has no complete set of generated pairs (no {MANIFEST}); run "
            "`make pairs` with the same settings first, or name another pair set (pairs=pickapic, "
            "parquet, ...; docs/pairs.md)"
        )
    for file in manifest.files:
        path = folder / file.name
        if not path.exists() or path.stat().st_size != file.bytes:
            problem = "was changed" if path.exists() else "is missing"
            raise PairsError(
                f"{path} {problem} since {MANIFEST} was written; delete it, if it is there, and "
                "run `make pairs` with the same settings again"
            )
    _refuse_others(spec, folder, {file.name for file in manifest.files})
    return pickapic.open_layout(spec)


def _refuse_others(spec: PairsSpec, folder: Path, ours: set[str]) -> None:
    """Refuse files of pairs that are not the set's own, which would be read with it."""
    if others := [name for name in open_root(spec).names("**/*.parquet") if name not in ours]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise PairsError(
            f"{folder / others[0]}{more} is not of the set that {MANIFEST} describes; move it out "
            "of the folder (pairs=mixture reads several sets together)"
        )
