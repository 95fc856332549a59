"""Paths as people type them."""

import os
from pathlib import Path

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux allows for a name and for a path."""


def user_path(text: str, setting: str = "") -> Path:
    """The path that a setting means: `~` is the home folder, in every setting of every stage.

    Raises:
        ValueError: There is no such user, or no path is that long; names `setting`, if any.
    """
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in text.split("/")) or (
        len(os.fsencode(text)) > LONGEST_PATH
    ):
        raise ValueError(
            f"{setting or 'a path'}={text[:60]}... is longer than a path can be; give the path of "
            "a file or folder"
        )
    if not text.startswith("~"):
        return Path(text)  # which would make ~x of ./~x
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = Path(text).parts[0]
        raise ValueError(
            f"{f'{setting}={text}' if setting else text}: {user} is no user's home folder on this "
            "machine; write the whole path, or ./~... for a folder of that name"
        ) from error


def cache_folder() -> Path:
    """Where this program keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "balanceddpo"


def is_same_folder(text: str, folder: Path) -> bool:
    """Whether a setting means this folder, however it is written; a URL never does."""
    return "://" not in text and user_path(text).resolve() == folder.resolve()
