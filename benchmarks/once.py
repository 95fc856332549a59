"""Folders that take long to write, so that several processes one after another use them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(folder: Path, write: Callable[[Path], Any]) -> Path:
    """The folder, written by `write` if it is not there: whole or not at all."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.rename(folder)
    return folder
