"""The manifest of a set: what is in it, what made it, and whether its files are intact.

A *set* is a folder of Parquet shards (`part-00000.parquet`, ...) with a `manifest.json` that is
written last: its presence means that the set is complete. Readers trust the manifest, never a
directory listing. `parquet_io` puts a shard's settings into its footer and `config_diff` compares
them, so that an interrupted set is resumed and one made with other settings is refused.
"""

import hashlib
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pyarrow.parquet as pq

from data.artifacts.atomic import ShardError, read_json, sha256_of, write_json

SCHEMA_VERSION = 1


MANIFEST = "manifest.json"


NOT_THIS_SET = (
    "{path} is not a {kind} set: {problem}. Delete the folder, or choose another run folder."
)
REBUILD = "delete it and run the same command again: files that are whole are kept"
"""What to do about a manifest that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a set as the manifest knows it."""

    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: list[int]
    """Rows of each row group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete set is, what made it, and from what."""

    kind: str
    settings: dict[str, Any]
    files: list[FileEntry]
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Input files with name, bytes and sha256."""
    counts: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    """What is worth knowing but does not decide the rows: revisions, versions, batch sizes."""
    schema_version: int = SCHEMA_VERSION
    code_revision: str = ""

    @property
    def rows(self) -> int:
        """Rows of all files together."""
        return sum(file.rows for file in self.files)

    @property
    def identity(self) -> str:
        """Names the rows, whatever else is noted: SHA-256 over the files' names and hashes."""
        listing = "".join(f"{file.name}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()


def part_name(index: int) -> str:
    """The file name of a set's shard."""
    return f"part-{index:05d}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare a set complete; call it last."""
    revision = manifest.code_revision or code_revision()
    write_json(folder / MANIFEST, asdict(manifest) | {"code_revision": revision})


def read_manifest(folder: Path, kind: str) -> Manifest | None:
    """Read the manifest of a complete set; None when the set is not (yet) complete.

    Raises:
        ShardError: The manifest is damaged, of another kind, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    value = read_json(path, REBUILD)
    try:
        files = [FileEntry(**file) for file in value.pop("files")]
        manifest = Manifest(files=files, **value)
        problem = _inconsistency(manifest)
    except KeyError as error:
        problem = f"it has no {error}"
    except TypeError as error:
        problem = str(error)
    if problem:
        raise ShardError(f"{path} does not describe a set ({problem}); {REBUILD}")
    if manifest.kind != kind or manifest.schema_version != SCHEMA_VERSION:
        problem = f"it is a {manifest.kind} set of version {manifest.schema_version}"
        raise ShardError(NOT_THIS_SET.format(path=path, kind=kind, problem=problem))
    return manifest


def _inconsistency(manifest: Manifest) -> str:
    """What of a manifest contradicts itself; empty if nothing does."""
    entries: list[Manifest | FileEntry] = [manifest, *manifest.files]
    for entry in entries:
        if problem := _wrong_type(entry):
            return problem
    if not manifest.files:
        return "it lists no file"
    for file in manifest.files:
        if Path(file.name).name != file.name or sum(file.row_groups) != file.rows:
            return f"the entry of {file.name!r} contradicts itself"
    counts = manifest.counts
    counted = counts.get("pairs", manifest.rows)
    if manifest.kind == "labels" and counts:
        counted = sum(counts.values())  # of every outcome
    if counted != manifest.rows:
        return f"it counts {counted} of {manifest.rows} rows"
    return ""


def _wrong_type(entry: Manifest | FileEntry) -> str:
    """Which field of an entry has a value of another type; empty if none has."""
    for name, hint in get_type_hints(type(entry)).items():
        value, wanted = getattr(entry, name), get_origin(hint) or hint
        if not isinstance(value, wanted) or isinstance(value, bool):
            return f"{name} is {value!r}, needed is a {wanted.__name__}"
    counts = entry.row_groups if isinstance(entry, FileEntry) else entry.counts.values()
    if not all(type(count) is int and count >= 0 for count in counts):
        return "a number of rows is no whole number"
    return ""


def describe(path: Path) -> FileEntry:
    """Make a shard's manifest entry from the file itself."""
    metadata = pq.read_metadata(path)
    return FileEntry(
        name=path.name,
        rows=metadata.num_rows,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        row_groups=[metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)],
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every file against the manifest.

    Raises:
        ShardError: Names the first file that is missing or has other bytes.
    """
    for file in manifest.files:
        path = folder / file.name
        if not path.exists():
            raise ShardError(f"{path} is missing, though {MANIFEST} lists it; run `make labels`")
        if path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            raise ShardError(
                f"{path} has other bytes than {MANIFEST} says (sha256 {file.sha256[:12]}...); "
                f"delete it together with {MANIFEST} and run the same command again"
            )


@cache
def code_revision() -> str:
    """The git revision of the running code, with `+` when files differ from it; or "unknown"."""
    root = Path(__file__).parents[2]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
