"""Files written whole or not at all, and the hashes that name their bytes."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.artifacts.readable import LFS_POINTER, is_lfs_pointer

TOKEN = secrets.token_hex(4)
"""Names the partial files of this process and of its forks."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardError(ValueError):
    """A file is missing, damaged, or was made with other settings; the message says what to do."""


def publish(partial: Path, path: Path, *, keep_existing: bool = False) -> None:
    """Make a finished partial file the file at `path`, on disk before it is seen.

    With `keep_existing` a file that is there stays, even if another process puts it there at this
    very moment.
    """
    fsync(partial)
    if keep_existing:
        _link_unless_there(partial, path)
    else:
        partial.replace(path)
    fsync(path.parent)  # the rename itself must outlive a power cut


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_unless_there(partial: Path, path: Path) -> None:
    """Give the partial file its final name, unless a file has that name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        if not path.exists():  # a link to nothing
            partial.replace(path)
            return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not path.exists():  # a file system without hard links leaves a moment in between
            partial.replace(path)
            return
    partial.unlink()


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: same folder, hidden, ours alone.

    Processes on two machines may well have the same number, so there is a token besides; and two
    threads may write the same file.
    """
    thread = threading.get_native_id()
    return path.with_name(f".{path.name}.{TOKEN}-{os.getpid()}-{thread}")


@contextmanager
def atomic_path(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A file to fill beside `path`, which takes its place at the end of the block, or nothing does.

    With `keep_existing` a file that is at `path` by then stays.

    Raises:
        ShardError: The disk is full or cannot be written; says what to do.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        publish(partial, path, keep_existing=keep_existing)
    except OSError as error:
        cure = "free some space" if error.errno in NO_SPACE else "make its folder writable"
        raise ShardError(
            f"{path} cannot be written ({error}); {cure} or choose another place (runs=...), then "
            "run the same command again: what is finished is kept"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def remove_partials(folder: Path, since: float) -> None:
    """Remove what killed processes left half written (`partial_path`).

    Another rank may still be writing a file that is younger than `since`, when this run began, and
    may remove one at the same moment.
    """
    for path in folder.glob(".*"):
        with suppress(FileNotFoundError):
            if re.fullmatch(r"\..+-\d+", path.name) and path.stat().st_mtime < since:
                path.unlink()


def write_bytes(path: Path, content: bytes, *, keep_existing: bool = False) -> None:
    """Write a small file whole or not at all; with `keep_existing` one that is there stays."""
    with atomic_path(path, keep_existing=keep_existing) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any, *, keep_existing: bool = False) -> None:
    """Write JSON that people read, as `write_bytes` writes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_bytes(path, (text + "\n").encode(), keep_existing=keep_existing)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object that `write_json` wrote into a run folder.

    Raises:
        ShardError: It cannot be read, or is no object; ends with `advice`.
    """
    try:
        content = path.read_bytes()
        value = {} if is_lfs_pointer(content) else json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ShardError(f"{path} cannot be read ({error}); {advice}") from error
    if is_lfs_pointer(content):
        raise ShardError(f"{path} {LFS_POINTER}; or {advice}")
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ShardError(f"{path} has a JSON {kind}, needed is an object; {advice}")
    return value


def remove(path: Path) -> None:
    """Delete what is at a path, if anything: a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
