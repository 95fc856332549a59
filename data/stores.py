"""Where files of a pair set lie: a folder of this machine, or one of an object store.

Both list, measure and open files by their names below the folder, so nothing else here knows the
difference. Only a file that is not there is an answer; a disk or a store that fails ends the run.
"""

import errno
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote

from data.shards import sha256_of

THREADS = 16
"""Requests to an object store at a time: one takes tens of milliseconds, whatever its size."""
AWAY = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""There is no such file."""

T = TypeVar("T")


class StoreError(ValueError):
    """A folder cannot be read; the message names it and says what to do."""


@runtime_checkable
class Store(Protocol):
    """A folder of files that are read, never written."""

    @property
    def url(self) -> str:
        """The folder as messages name it."""

    @property
    def far(self) -> bool:
        """Whether each request travels."""

    def names(self, pattern: str) -> list[str]:
        """Files by pattern (`**/*.parquet`, `*.tar`, `images/*/*.zip`), sorted folder by folder."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""

    def open(self, name: str) -> BufferedReader:
        """A file for reading from its beginning to its end, or parts of it."""

    def source(self, name: str) -> str | BufferedReader:
        """The same for Arrow, which reads paths faster than Python's files."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Some bytes of a file, fewer where it ends.

        Raises:
            OSError: There is no such file.
            StoreError: The disk or the store fails.
        """

    def state(self, name: str) -> dict[str, Any]:
        """JSON values of which one changes when the file does; `bytes` is among them."""

    def fingerprint(self, name: str) -> dict[str, str]:
        """What names the content, as far as it is known without fetching it: sha256, or etag."""


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A folder of this machine."""

    folder: Path
    far: bool = False

    @property
    def url(self) -> str:
        """The folder as messages name it."""
        return str(self.folder)

    def names(self, pattern: str) -> list[str]:
        """Files by pattern, sorted folder by folder."""
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in found]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        path = self.folder / name
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise StoreError(f"{path} cannot be read: {error}") from error

    def open(self, name: str) -> BufferedReader:
        """A file for reading from its beginning to its end, or parts of it."""
        return (self.folder / name).open("rb")

    def source(self, name: str) -> str | BufferedReader:
        """The file's path."""
        return str(self.folder / name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Some bytes of a file, fewer where it ends."""
        try:
            with self.open(name) as file:
                file.seek(offset)
                return file.read(size)
        except AWAY:
            raise
        except OSError as error:
            raise StoreError(f"{self.folder / name} cannot be read: {error}") from error

    def state(self, name: str) -> dict[str, Any]:
        """Size and time."""
        status = (self.folder / name).stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def fingerprint(self, name: str) -> dict[str, str]:
        """The file's SHA-256."""
        return {"sha256": sha256_of(self.folder / name)}


def open_store(setting: str, url: str, hint: str = "") -> Store:
    """A folder of this machine, or of an object store by its URL.

    `s3://` and `gs://` go through Arrow, `hf://` through the hub's own client, others through
    fsspec. `setting` is named in messages, with `hint`.

    Raises:
        StoreError: There is no such folder, no way to it, or a URL that may mean another folder
            tomorrow.
    """
    scheme, far, rest = url.partition("://")
    if not far or scheme == "file":
        folder = Path(unquote(rest) if far else url).expanduser()
        if not folder.is_dir():
            raise StoreError(f"{setting}={url} is not a folder; {hint}")
        return LocalStore(folder)
    from data.far import open_far  # fsspec, only where it is used

    return open_far(setting, url, hint)


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them made in a thread before they are wanted."""
    iterator = iter(items)
    thread = ThreadPoolExecutor(1)
    try:
        waiting = [thread.submit(list, islice(iterator, 1)) for _ in range(depth)]
        while item := waiting.pop(0).result():
            waiting.append(thread.submit(list, islice(iterator, 1)))
            yield item[0]
    finally:
        thread.shutdown(cancel_futures=True)
