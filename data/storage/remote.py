"""Object stores: `s3://` and `gs://` through Arrow's clients, `hf://` and others through fsspec."""

import re
from typing import Any

import pyarrow as pa
from pyarrow import fs

from data.storage.base import AWAY, Store, StoreError, words_of
from data.storage.hub import BRANCH, unreachable

HUB_PATH = re.compile(r"datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}(/.*)?")


def open_remote(setting: str, url: str, hint: str = "") -> Store:
    """Open a folder of an object store; `setting` is named in messages, with `hint`.

    Raises:
        StoreError: There is no such folder, no way to it, or the URL may mean another folder
            tomorrow.
    """
    scheme = url.partition("://")[0]
    _check_url(setting, url)
    if scheme == "hf" and (reason := unreachable()):
        raise StoreError(f"{setting}={url} cannot be opened: {reason}; {hint}")
    try:
        files, path = _file_system(url)
        is_folder = _is_folder(files, path)
    except AWAY as error:
        raise StoreError(
            f"{setting}={url}: there is no such folder ({words_of(error)}); {hint}"
        ) from error
    except Exception as error:  # clients' network errors have no common base
        raise StoreError(f"{setting}={url} cannot be opened: {words_of(error)}; {hint}") from error
    if not is_folder:
        raise StoreError(f"{setting}={url} is not a folder; {hint}")
    return Store(url.partition("?")[0].rstrip("/"), files, path.rstrip("/"), remote=True)


def _check_url(setting: str, url: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme == "hf" and not HUB_PATH.fullmatch(rest):
        raise StoreError(
            f"{setting}={url}; give hf://datasets/<owner>/<name>@<commit>/<folder> with the "
            f"40-digit commit, because {BRANCH}"
        )
    if "@" in rest.partition("/")[0]:
        raise StoreError(
            f"{setting} has a name or password before the @, and settings are written into "
            "manifests; give credentials by the environment (AWS_ACCESS_KEY_ID, ...)"
        )


def _file_system(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, and the folder as it names it."""
    if url.startswith(("s3://", "gs://")):
        files, path = fs.FileSystem.from_uri(url)
        return files, str(path)
    import fsspec  # only where it is used

    client, path = fsspec.url_to_fs(url)
    return fs.PyFileSystem(ClientHandler(client)), str(path)


def _is_folder(files: fs.FileSystem, path: str) -> bool:
    """Whether a path is a folder, not a file.

    Raises:
        FileNotFoundError: It is neither; in the client's words.
    """
    if isinstance(files, fs.PyFileSystem):
        return bool(files.handler.fs.info(path.rstrip("/"))["type"] == "directory")
    kind = files.get_file_info(path.rstrip("/")).type
    if kind is fs.FileType.NotFound:
        raise FileNotFoundError(path)
    return kind is fs.FileType.Directory


class ClientHandler(fs.FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """An fsspec client for Arrow.

    Arrow's own handler asks `isfile` before it opens, which takes every failure for a missing file.
    """

    def open_input_file(self, path: str) -> pa.PythonFile:
        """A file read by exact ranges."""
        return pa.PythonFile(_ClientFile(self.fs.open(path, "rb", cache_type="none")), mode="r")


class _ClientFile:
    """A client's file whose failures are OSErrors, whatever the client raises."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except OSError:
            raise
        except Exception as error:
            raise OSError(words_of(error)) from error
