"""A folder of this machine as a `Store`."""

import errno
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from data.artifacts.atomic import sha256_of
from data.storage.base import AWAY, StoreError


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
