"""Files below a folder of this machine; Arrow follows links in circles and wants UTF-8 names."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath


def names_below(root: str, pattern: str) -> Iterator[str]:
    """Files by pattern, relative to the root; hidden ones are skipped and links are followed.

    Raises:
        OSError: A folder cannot be listed, or a link that fits the pattern leads nowhere.
    """
    *parents, last = PurePosixPath(pattern).parts
    folders = [""]
    if parents == ["**"]:
        folders = list(_tree(root))
    else:
        for part in parents:
            folders = [
                _join(folder, entry.name)
                for folder in folders
                for entry in _entries(root, folder)
                if entry.is_dir() and fnmatchcase(entry.name, part)
            ]
    for folder in folders:
        for entry in _entries(root, folder):
            if fnmatchcase(entry.name, last) and _is_file(entry):
                yield _join(folder, entry.name)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder it lies in, is hidden: macOS's `._a`, Jupyter's checkpoints."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _tree(root: str) -> Iterator[str]:
    """Every folder once: the real ones first, then what links lead to; no link leads upwards."""
    folders, links = [""], list[str]()
    seen = set[Path]()
    while folders or links:
        linked = not folders
        folder = links.pop(0) if linked else folders.pop()
        target = Path(root, folder).resolve()
        if target in seen or (linked and any(path.is_relative_to(target) for path in seen)):
            continue
        seen.add(target)
        yield folder
        for entry in _entries(root, folder):
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(_join(folder, entry.name))


def _entries(root: str, folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(Path(root, folder)) as entries:
        visible = [entry for entry in entries if not is_hidden(entry.name)]
    return sorted(visible, key=lambda entry: entry.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink() and not Path(entry.path).exists():
        raise OSError(
            f"{entry.path} is a link to {Path(entry.path).readlink()}, which is not there; fetch "
            "what it leads to, or delete the link"
        )
    return entry.is_file()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
