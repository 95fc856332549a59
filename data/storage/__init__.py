"""Where files of a pair set lie: a folder of this machine, or one of an object store by its URL."""

from urllib.parse import unquote

from pyarrow import fs

from data.storage.base import Store, StoreError
from data.storage.paths import user_path
from data.storage.remote import open_remote


def open_store(setting: str, url: str, hint: str = "") -> Store:
    """Open a folder of this machine, or of an object store by its URL.

    `setting` is named in messages, with `hint`.

    Raises:
        StoreError: There is no such folder, no way to it, or a URL that may mean another folder
            tomorrow.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        folder = user_path(unquote(rest) if separator else url, setting)
        if not folder.is_dir():
            raise StoreError(f"{setting}={url} is not a folder; {hint}")
        return Store(str(folder), fs.LocalFileSystem(), str(folder), remote=False)
    return open_remote(setting, url, hint)
