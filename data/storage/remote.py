"""Object stores: `s3://` and `gs://` through Arrow's clients, `hf://` and others through fsspec."""

import os
import re
import socket
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs

from data.storage.base import AWAY, Store, StoreError, UnreachableError, words_of
from data.storage.hub import BRANCH, unreachable

HOSTS = {"s3": "s3.amazonaws.com", "gs": "storage.googleapis.com"}
ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}
"""Variables in which the clients look for another host."""
TIMEOUT_S = 2.0
"""Longest wait for a bucket's host; one that takes longer is left to the client."""
HUB_PATH = re.compile(r"datasets/[\w.-]+/[\w.-]+@[0-9a-f]{40}(/.*)?")


def open_remote(setting: str, url: str, hint: str = "") -> Store:
    """Open a folder of an object store; `setting` is named in messages, with `hint`.

    Raises:
        StoreError: There is no such folder, no way to it, or the URL may mean another folder
            tomorrow.
    """
    scheme = url.partition("://")[0]
    _check_url(setting, url)
    if reason := unreachable() if scheme == "hf" else no_way_to(url):
        raise UnreachableError(f"{setting}={url} cannot be opened: {reason}; {hint}")
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


def no_way_to(url: str) -> str:
    """Why a bucket's host cannot be reached; empty where it can, perhaps, or where nobody knows.

    Without a network the clients try for several seconds before they say so. A host that does not
    answer in time is left to them, and so is everything behind a proxy.
    """
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return ""
    if (address := _address(url)) is None:
        return ""
    try:
        socket.create_connection(address, timeout=TIMEOUT_S).close()
    except TimeoutError:
        return ""
    except OSError as error:
        return f"{address[0]} cannot be reached ({words_of(error)}): is there a network?"
    return ""


def _address(url: str) -> tuple[str, int] | None:
    """Host and port of a bucket's service; None for a client that finds its own."""
    parts = urlsplit(url)
    if parts.scheme not in HOSTS:
        return None
    variables = [os.environ.get(name) for name in ENDPOINTS[parts.scheme]]
    given = [*parse_qs(parts.query).get("endpoint_override", []), *filter(None, variables)]
    if not given:
        return HOSTS[parts.scheme], 443
    secure = not (given[0].startswith("http://") or "scheme=http&" in f"{parts.query}&")
    host = urlsplit(given[0] if "://" in given[0] else f"//{given[0]}")
    return (host.hostname, host.port or (443 if secure else 80)) if host.hostname else None


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
