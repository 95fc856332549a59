"""A folder of files to read, on this machine or in an object store, through Arrow's file systems.

Only a file that is not there is an answer; a disk or a store that fails ends the run. Failed
requests are repeated by the clients (Arrow's for S3 and GCS, huggingface_hub's), not here.
"""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from data.artifacts.atomic import sha256_of
from data.artifacts.readable import LFS_HEAD, LFS_POINTER, is_lfs_pointer
from data.storage.local import is_hidden, names_below

THREADS = 16
"""Requests to an object store at a time: one takes tens of milliseconds, whatever its size."""
BUFFER_BYTES = 4 << 20
"""What is fetched at least, where a remote file is read bit by bit."""
LONGEST_NAME = 1024
"""Bytes of the longest key that S3 takes."""
AWAY = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""There is no such file."""


class StoreError(ValueError):
    """A folder cannot be read; the message names it and says what to do."""


class UnreachableError(StoreError):
    """There is no way to a store from this machine: each of its processes sees the same."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of files that are read, never written."""

    url: str
    """The folder as messages name it."""
    files: fs.FileSystem
    folder: str
    """The folder as `files` names it, without a slash at its end."""
    remote: bool
    """Whether each request travels."""

    def names(self, pattern: str) -> list[str]:
        """Files by pattern (`**/*.parquet`, `*.tar`, `images/*/*.zip`), sorted folder by folder.

        Hidden files and folders are left out; links of this machine are followed.

        Raises:
            StoreError: A folder cannot be listed.
        """
        if not self.remote:
            return self._local_names(pattern)
        *parents, last = PurePosixPath(pattern).parts
        recursive = parents == ["**"]
        folders = [PurePosixPath()]
        for part in () if recursive else parents:
            folders = [
                path
                for folder in folders
                for path in self._list(folder, fs.FileType.Directory)
                if path.match(part)
            ]
        paths = [
            path
            for folder in folders
            for path in self._list(folder, fs.FileType.File, recursive=recursive)
            if path.match(last)
        ]
        return [path.as_posix() for path in sorted(paths) if not is_hidden(path.as_posix())]

    def _local_names(self, pattern: str) -> list[str]:
        try:
            names = map(PurePosixPath, names_below(self.folder, pattern))
            return [path.as_posix() for path in sorted(names)]
        except OSError as error:
            raise StoreError(f"{self.url} cannot be listed: {words_of(error)}") from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        if len(os.fsencode(name)) > LONGEST_NAME or "\0" in name:
            return None
        try:
            with self._failures(name):
                info = self.files.get_file_info(self._path(name))
        except AWAY:
            return None
        return int(info.size) if info.type is fs.FileType.File else None

    @contextmanager
    def open(self, name: str) -> Iterator[io.BufferedReader]:
        """A file to read from any position, closed with the block.

        Raises:
            FileNotFoundError: There is no such file.
            StoreError: The disk or the store fails.
        """
        with self._failures(name, OSError), self._buffered(name) as file:
            yield file

    def arrow_source(self, name: str) -> str | io.BufferedReader:
        """A file for Arrow: a path, which it reads fastest; or, of a remote one, a buffered file.

        The buffer joins requests: columns of a row group that are small lie side by side.
        """
        return self._buffered(name) if self.remote else self._path(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read some bytes of a file, fewer where it ends.

        Raises:
            FileNotFoundError: There is no such file.
            StoreError: The disk or the store fails.
        """
        with self._failures(name), self.files.open_input_file(self._path(name)) as file:
            content: bytes = file.read_at(size, offset)
            expected = min(size, file.size() - offset)
            if len(content) < expected:
                raise EOFError(f"{len(content)} of {expected} bytes came")
            return content

    def refuse_pointer(self, name: str) -> None:
        """Refuse a file whose content was left on a Git server.

        Raises:
            StoreError: Names it.
        """
        if is_lfs_pointer(self.read(name, 0, len(LFS_HEAD))):
            raise StoreError(f"{self.url}/{name} {LFS_POINTER}")

    def state(self, name: str) -> dict[str, Any]:
        """JSON values of which one changes when the file does; `bytes` is among them."""
        with self._failures(name):
            info = self.files.get_file_info(self._path(name))
        size = {"bytes": int(info.size)}
        if not self.remote:
            return size | {"mtime_ns": info.mtime_ns}
        client = self._client_info(name)
        changed = client.get("mtime") or client.get("created") or info.mtime
        return size | (self.fingerprint(name) or {"time": str(changed or "")})

    def fingerprint(self, name: str) -> dict[str, str]:
        """What names the content: sha256 of local and hub files, or a store's etag, if it has one.

        No remote file is fetched for it.
        """
        if not self.remote:
            return {"sha256": sha256_of(Path(self._path(name)))}
        client = self._client_info(name)
        if sha256 := getattr(client.get("lfs"), "sha256", None):
            return {"sha256": sha256}
        etag = self._s3_etag(name) if self.files.type_name == "s3" else client.get("ETag")
        return {"etag": str(etag).strip('"')} if etag else {}

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}".rstrip("/")

    def _list(
        self, folder: PurePosixPath, kind: fs.FileType, *, recursive: bool = False
    ) -> list[PurePosixPath]:
        name = folder.as_posix().removeprefix(".")
        selector = fs.FileSelector(self._path(name), recursive=recursive)
        try:
            with self._failures(name):
                infos = self.files.get_file_info(selector)
        except AWAY as error:
            raise StoreError(f"{self.url}/{name} cannot be listed: {words_of(error)}") from error
        root = f"{self.folder.strip('/')}/"
        paths = [info.path.strip("/").removeprefix(root) for info in infos if info.type is kind]
        return [PurePosixPath(path) for path in paths]

    def _buffered(self, name: str) -> io.BufferedReader:
        with self._failures(name):
            file = self.files.open_input_file(self._path(name))
        buffer = BUFFER_BYTES if self.remote else io.DEFAULT_BUFFER_SIZE
        return io.BufferedReader(file, buffer)

    def _client_info(self, name: str) -> dict[str, Any]:
        """What an fsspec client says of a file; Arrow's own file systems say nothing more."""
        if not isinstance(self.files, fs.PyFileSystem):
            return {}
        with self._failures(name):
            return dict(self.files.handler.fs.info(self._path(name)))

    def _s3_etag(self, name: str) -> str:
        with self._failures(name), self.files.open_input_file(self._path(name)) as file:
            etag: bytes = (file.metadata() or {}).get("ETag", b"")
        return etag.decode()

    @contextmanager
    def _failures(self, name: str, errors: type[Exception] = Exception) -> Iterator[None]:
        """Say which file cannot be read; only that it is not there passes through.

        Clients' network errors have no common base, so `errors` are all of them.
        """
        try:
            yield
        except AWAY:
            raise
        except errors as error:
            if getattr(error, "errno", None) == errno.ENAMETOOLONG:
                raise FileNotFoundError(name) from error
            raise StoreError(
                f"{f'{self.url}/{name}'.rstrip('/')} cannot be read: {words_of(error)}; what is "
                "finished is kept: when the disk or store answers again, rerun the same command"
            ) from error


def words_of(error: BaseException) -> str:
    """An error's message, or its name where it has none."""
    return str(error).strip() or type(error).__name__
