"""Which files a split has: told from the whole name of a file, or of the folder it lies in."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

EVERY = "all"
"""The split that takes every file, whatever its name says."""
SHARD = re.compile(r"(?:[-_. ]\d+(?:[-_. ].*)?)?", re.DOTALL)
"""What follows a split's name: nothing, or `-00000-of-00645-0123456789abcdef`, `_1`, `.2`."""
WORD = re.compile(r"(?:train|training|test|testing|val|valid|validation|dev|eval|evaluation)\b")
"""Names that say by themselves that they are a split's."""
SUFFIXES = (".parquet", ".jsonl", ".json", ".tar")


def files_of_split(names: Sequence[str], split: str, root: str = "", lead: str = "") -> list[str]:
    """Those of a split; a file's own name decides before its folder's, the inner before the outer.

    `root` is the name of the folder that `names` are relative to; each file's name begins with
    `lead`, which is no part of its split's name. An empty split takes every file.
    """
    if not split or (split == EVERY and not any(_belongs(n, split, root, lead) for n in names)):
        return list(names)
    return [name for name in names if _belongs(name, split, root, lead)]


def splits_of(names: Sequence[str], lead: str = "") -> list[str]:
    """The splits that the names of files or folders tell."""
    known = {next(filter(None, map(_named_split, _parts(name, "", lead))), "") for name in names}
    return sorted(known - {""})


def _belongs(name: str, split: str, root: str, lead: str) -> bool:
    for part in _parts(name, root, lead):
        if part.startswith(split) and SHARD.fullmatch(part[len(split) :]):
            return True
        if _named_split(part):
            return False
    return False


def _parts(name: str, root: str, lead: str) -> list[str]:
    """The names that may tell a split, innermost first, without suffixes."""
    path = PurePosixPath(root or "_", name)
    own, *folders = reversed(path.parts)
    return [_stem(own).removeprefix(lead), *map(_stem, folders)]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem if name.endswith(SUFFIXES) else name


def _named_split(part: str) -> str:
    """The split that a name tells by itself: `validation_unique` of `validation_unique-0`."""
    if not WORD.match(part.replace("_", "-").lower()):
        return ""
    return re.split(r"[-_. ]\d", part, maxsplit=1)[0]
