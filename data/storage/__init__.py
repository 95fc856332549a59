"""Where files of a pair set lie: a folder of this machine, or one of an object store.

Both list, measure and open files by their names below the folder, so nothing else here knows the
difference. Only a file that is not there is an answer; a disk or a store that fails ends the run.
"""

from pathlib import Path
from urllib.parse import unquote

from data.storage.base import Store, StoreError
from data.storage.local import LocalStore


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
    from data.storage.remote import open_remote  # fsspec, only where it is used

    return open_remote(setting, url, hint)
