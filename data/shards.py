"""Files on disk: written whole or not at all, described by a manifest, verified when read.

A *set* is a folder of Parquet shards (`part-00000.parquet`, ...) with a `manifest.json` that is
written last: its presence means that the set is complete. Readers trust the manifest, never a
directory listing. Each shard carries the settings it was made with in its footer, so that an
interrupted set can be continued, and one made with other settings is refused.
"""

import errno
import hashlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SETTINGS_KEY = b"balanceddpo.settings"
ROW_GROUP_ROWS = 65_536
TOKEN = secrets.token_hex(4)
"""Ours and our forks'."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NOT_THIS_SET = (
    "{path} is not a {kind} set: {problem}. Delete the folder, or choose another run folder."
)


class ShardError(ValueError):
    """A file is missing, damaged, or was made with other settings; the message says what to do."""


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


# --- writing -------------------------------------------------------------------------------------


def replace_whole(partial: Path, path: Path) -> None:
    """Make a finished partial file the file at `path`, on disk before it is seen."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must outlive a power cut
    finally:
        os.close(folder)


def partial_of(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: same folder, hidden, ours alone.

    Processes on two machines may well have the same number, so there is a token besides.
    """
    return path.with_name(f".{path.name}.{TOKEN}-{os.getpid()}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to fill beside `path`, which takes its place at the end of the block, or nothing does.

    Raises:
        ShardError: The disk is full or cannot be written; says what to do.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        replace_whole(partial, path)
    except OSError as error:
        cure = "free some space" if error.errno in NO_SPACE else "make its folder writable"
        raise ShardError(
            f"{path} cannot be written ({error}); {cure} or choose another place (runs=...), then "
            "run the same command again: what is finished is kept"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that people read, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def write_table(
    path: Path,
    table: pa.Table,
    settings: Mapping[str, Any] | None = None,
    *,
    blobs: Sequence[str] = (),
    row_group_rows: int = ROW_GROUP_ROWS,
) -> None:
    """Write a Parquet file whole or not at all, with page checksums and its settings in the footer.

    `blobs` names columns of encoded bytes: they are stored as they are, without dictionary,
    statistics or compression, which is 5 to 10 times faster to stream.
    """
    plain = [name for name in table.column_names if name not in blobs]
    if settings is not None:
        footer = {SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode()}
        table = table.replace_schema_metadata(footer)
    with whole(path) as partial:
        pq.write_table(
            table,
            partial,
            row_group_size=row_group_rows,
            compression={name: "none" if name in blobs else "zstd" for name in table.column_names},
            use_dictionary=plain if blobs else True,
            write_statistics=plain if blobs else True,
            write_page_checksum=True,
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare a set complete; call it last."""
    revision = manifest.code_revision or code_revision()
    write_json(folder / MANIFEST, asdict(manifest) | {"code_revision": revision})


# --- reading -------------------------------------------------------------------------------------


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard; a damaged page is an error, not data.

    Raises:
        ShardError: The file is missing, torn or damaged.
    """
    try:  # not pq.read_table: its planning takes twice the time of reading 1 500 rows
        file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        return file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} cannot be read ({error}); delete it and run the same command again"
        ) from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a shard's footer; empty when it has none.

    Raises:
        ShardError: The file is torn or is no Parquet file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{path} cannot be read ({error}); delete it and run the same command again"
        ) from error
    settings: dict[str, Any] = json.loads(metadata.get(SETTINGS_KEY, b"{}"))
    return settings


def read_manifest(folder: Path, kind: str) -> Manifest | None:
    """The manifest of a complete set, or None when the set is not (yet) complete.

    Raises:
        ShardError: The manifest is damaged, of another kind, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        files = [FileEntry(**file) for file in value.pop("files")]
        manifest = Manifest(files=files, **value)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(NOT_THIS_SET.format(path=path, kind=kind, problem=error)) from error
    if manifest.kind != kind or manifest.schema_version != SCHEMA_VERSION:
        problem = f"it is a {manifest.kind} set of version {manifest.schema_version}"
        raise ShardError(NOT_THIS_SET.format(path=path, kind=kind, problem=problem))
    return manifest


def describe(path: Path) -> FileEntry:
    """A shard's manifest entry, from the file itself."""
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


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """One SHA-256 over the names and bytes of all files below a folder (or of a single file)."""
    if folder.is_file():
        return sha256_of(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


@cache
def code_revision() -> str:
    """The git revision of the running code, with `+` when files differ from it; or "unknown"."""
    root = Path(__file__).parent.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
