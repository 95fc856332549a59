"""Files of an object store, through fsspec.

A store fails now and then, and a label must not depend on when: what may pass is asked for again,
with pauses, and what does not pass ends the run.
"""

import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from data.storage.base import AWAY, StoreError
from data.storage.hub import unreachable

WAITS_S = (1.0, 4.0, 16.0)
"""Pauses before a request is repeated; after the last one the run ends. Clients repeat on their own
too, within seconds."""
BUFFER_BYTES = 4 << 20
"""What is fetched at least, where a file is read bit by bit."""

LONGEST_NAME = 1024
"""Bytes of the longest key that S3 takes."""
HUB_PATH = re.compile(r"datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}(/.*)?")
FINAL_WORDS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE")
"""In errors of Arrow's S3 client that repeating does not cure."""
FINAL = (ImportError, LookupError, NotImplementedError, PermissionError, TypeError, ValueError)
"""Errors that repeating does not cure. Clients' network errors have no common base, so those are
all the others."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteStore:
    """A folder of an object store, through fsspec."""

    url: str
    files: Any
    """An `fsspec.AbstractFileSystem`."""
    folder: str
    """The folder as `files` names it, without a slash at its end."""
    far: bool = True

    def names(self, pattern: str) -> list[str]:
        """Files by pattern, sorted folder by folder."""
        wanted = PurePosixPath(pattern)
        deep = wanted.parts[0] == "**"  # which matches one folder only, outside of `glob`
        depth = None if deep else len(wanted.parts)
        found = self.ask("be listed", "", lambda path: self.files.find(path, maxdepth=depth))
        below = [PurePosixPath(self._below(path)) for path in found]
        if deep:
            return [name.as_posix() for name in sorted(below) if name.match(wanted.name)]
        fitting = (name for name in sorted(below) if name.match(pattern))
        return [name.as_posix() for name in fitting if len(name.parts) == depth]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        if len(name.encode()) > LONGEST_NAME or "\0" in name:
            return None
        try:
            info = self._info(name)
        except AWAY:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def open(self, name: str) -> io.BufferedReader:
        """A file for reading from any position, fetched in pieces of at least `BUFFER_BYTES`."""
        return io.BufferedReader(_RemoteFile(self, name), BUFFER_BYTES)

    def source(self, name: str) -> str | io.BufferedReader:
        """The same: Arrow asks for columns of a row group, and small ones lie side by side."""
        return self.open(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Some bytes of a file, fewer where it ends, and no more than these."""
        with _RemoteFile(self, name) as file:
            file.seek(offset)
            return file.read(size)

    def state(self, name: str) -> dict[str, Any]:
        """Size, and what the store says of the content, or else of its time."""
        info = self._info(name)
        stamp = {"time": str(info.get("mtime") or info.get("created") or "")}
        return {"bytes": int(info["size"])} | (self.fingerprint(name) or stamp)

    def fingerprint(self, name: str) -> dict[str, str]:
        """The hub's SHA-256, or the store's etag or time, without fetching the file."""
        info = self._info(name)
        if sha256 := getattr(info.get("lfs"), "sha256", None):
            return {"sha256": sha256}
        arrow = self.files.protocol == "s3"  # whose list of files knows no etags
        etag = self.ask("be read", name, self._s3_etag) if arrow else info.get("ETag")
        return {"etag": str(etag).strip('"')} if etag else {}

    def ask(self, what: str, name: str, request: Callable[[str], T]) -> T:
        """Make a request about a file, again where it fails for a reason that may pass.

        Raises:
            StoreError: It failed for another reason, or too often; says what could not be done.
            FileNotFoundError: There is no such file.
        """
        path, where = (f"{root}/{name}".rstrip("/") for root in (self.folder, self.url))
        for wait_s in (*WAITS_S, None):
            try:
                return request(path)
            except AWAY:
                raise
            except Exception as error:
                if _is_final(error):
                    raise StoreError(f"{where} cannot {what}: {_words(error)}") from error
                if wait_s is None:
                    raise StoreError(
                        f"{where} cannot {what}, {len(WAITS_S) + 1} times in a row "
                        f"({_words(error)}); what is finished is kept: run the same command again"
                    ) from error
            time.sleep(wait_s)
        raise AssertionError

    def _info(self, name: str) -> dict[str, Any]:
        return dict(self.ask("be found", name, self.files.info))

    def _s3_etag(self, path: str) -> str:
        with self.files.fs.open_input_file(path) as file:
            etag: bytes = (file.metadata() or {}).get("ETag", b"")
        return etag.decode()

    def _below(self, path: str) -> str:
        return path.strip("/").removeprefix(f"{self.folder.strip('/')}/")


class _RemoteFile(io.RawIOBase):
    """A file of an object store, read by ranges; one that fails is asked for again."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self._store, self._name = store, name
        self._size = store.size(name)
        if self._size is None:
            raise FileNotFoundError(f"{store.url}/{name}")
        self._position = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        assert start is not None
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, size: int | None = -1) -> bytes:
        assert self._size is not None
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        content = self._store.ask("be read", self._name, lambda path: self._range(path, wanted))
        self._position += wanted
        return content

    def _range(self, path: str, wanted: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._store.files.open(path, "rb", cache_type="none")
            self._file.seek(self._position)
            content = bytes(self._file.read(wanted))
        except BaseException:
            self._file = None  # perhaps a connection that is gone
            raise
        if len(content) != wanted:
            self._file = None
            raise EOFError(f"{len(content)} of {wanted} bytes came")
        return content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def open_remote(setting: str, url: str, hint: str) -> RemoteStore:
    """A folder of an object store by its URL; `setting` is named in messages, with `hint`.

    `s3://` and `gs://` go through Arrow, `hf://` through the hub's own client, others through
    fsspec.

    Raises:
        StoreError: There is no such folder, no way to it, or the URL may mean another folder
            tomorrow.
    """
    _check_url(setting, url)
    if url.startswith("hf://") and (reason := unreachable()):
        raise StoreError(f"{setting}={url} cannot be opened: {reason}; {hint}")
    files, folder = _files_of(setting, url)
    store = RemoteStore(url.partition("?")[0].rstrip("/"), files, folder.rstrip("/"))
    try:
        found = store.ask("be found", "", files.info)["type"]
    except AWAY as error:
        raise StoreError(
            f"{setting}={url}: there is no such folder ({_words(error)}); {hint}"
        ) from error
    if found != "directory":
        raise StoreError(f"{setting}={url} is not a folder; {hint}")
    return store


def _check_url(setting: str, url: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme == "hf" and not HUB_PATH.fullmatch(rest):
        raise StoreError(
            f"{setting}={url}; give hf://datasets/<owner>/<name>@<commit>/<folder> with the "
            "40-digit commit, because a branch changes under your labels"
        )
    if "@" in rest.partition("/")[0]:
        raise StoreError(
            f"{setting} has a name or password before the @, and settings are written into "
            "manifests; give credentials by the environment (AWS_ACCESS_KEY_ID, ...)"
        )


def _files_of(setting: str, url: str) -> tuple[Any, str]:
    """An fsspec file system, and the folder as it names it."""
    try:
        if url.startswith(("s3://", "gs://")):
            arrow, folder = fs.FileSystem.from_uri(url)
            return ArrowFSWrapper(arrow), folder
        files, folder = fsspec.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:  # Arrow's errors are among these
        raise StoreError(f"{setting}={url} cannot be opened: {_words(error)}") from error
    return files, folder


def _is_final(error: Exception) -> bool:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status:
        return bool(400 <= status < 500) and status not in (408, 429)
    return isinstance(error, FINAL) or any(word in str(error) for word in FINAL_WORDS)


def _words(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
