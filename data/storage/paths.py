"""Paths as people type them."""

from pathlib import Path


def user_path(text: str, setting: str = "") -> Path:
    """The path that a setting means: `~` is the home folder, in every setting of every stage.

    Raises:
        ValueError: There is no such user; names `setting`, if any.
    """
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
