"""Where files of a pair set lie: a folder of this machine, or one of an object store.

Both list, measure and open files by their names below the folder, so nothing else here knows the
difference. Only a file that is not there is an answer; a disk or a store that fails ends the run.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

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
