"""Images in folders: those below one folder a prompt, or `<id>_<k>.png` beside `<id>.txt`.

Each two images of a prompt are a pair. Where people chose, their images' names end in `_w` for a
winner and `_l` for a loser.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations
from pathlib import PurePosixPath
from typing import NamedTuple

from data.artifacts.readable import UnreadableError, text_of
from data.pairs.config import PairsSpec
from data.pairs.files import open_root, size_of
from data.pairs.image_list import SHARD_ROWS, ListedPairs, as_listed
from data.pairs.image_store import NUM_TRIED, open_images
from data.pairs.kinds import shown
from data.pairs.rankings import Row, is_swapped
from data.pairs.schema import PairsError, PairShard
from data.pairs.splits import EVERY, WORD
from data.storage.base import Store

IMAGES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic",
)  # fmt: skip
"""Endings of image files; those of other formats than `data.images.FORMATS` become rows with a
status."""
OF_FOLDER = ("prompt.txt", "caption.txt")
"""Names of the text file that belongs to all images of its folder."""
NUMBERED = re.compile(r"(?P<id>.+?)(?:_(?P<k>\d+))?(?:_(?P<mark>[wl]))?", re.IGNORECASE)
MARK = re.compile(r".*_(?P<mark>[wl])", re.IGNORECASE | re.DOTALL)
TWO_MARKS = re.compile(r".*_[wl]_[wl]", re.IGNORECASE | re.DOTALL)
NUM_NAMED = 3
"""Files that a message names."""
SHARD = "folders"


class Group(NamedTuple):
    """The images of a prompt."""

    name: str
    """Its folder or text file, as messages name it."""
    text: str | None
    """The prompt; None where the text file is empty."""
    images: list[str]
    """Paths below the root, in the order of the numbers in their names."""


@dataclass(slots=True)
class Folder:
    """The files of one folder that matter, by name."""

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def own_text(self) -> list[str]:
        """The text files that belong to all of its images."""
        return [name for name in self.texts if name.lower() in OF_FOLDER]


@dataclass(frozen=True, slots=True)
class FolderPairs(ListedPairs):
    """Pairs of images in folders; there is no list but the files' names."""

    def fingerprint(self, shard: PairShard) -> dict[str, str]:
        """SHA-256 over the paths, prompts and choices of a shard's pairs."""
        return {"sha256": shard.reading.rpartition(" ")[2]}


def open_layout(spec: PairsSpec) -> FolderPairs:
    """Open a folder of images; every prompt has two or more.

    Raises:
        PairsError: A prompt has no text or a single image, or its marks contradict each other;
            names the files.
    """
    if spec.image_root:
        raise PairsError(
            "pairs=folders has its images below pairs.root; leave pairs.image_root out"
        )
    root = open_root(spec)
    groups = list(_groups(root, _folders(root, spec.split), spec.split))
    _check_groups(root, groups)
    rows = [row for group in groups for row in _pairs(group, spec.side_seed)]
    listing, shards = as_listed(rows), _shards(rows, spec)
    tried = [path for group in groups[:NUM_TRIED] for path in group.images[:1]]
    return FolderPairs(root, shards, {SHARD: listing}, open_images(root, ("",), tried, ()))


# --- files ---------------------------------------------------------------------------------------


def _folders(root: Store, split: str) -> dict[str, Folder]:
    """The folders with images or text files, by path below the root ("" is the root itself)."""
    folders: dict[str, Folder] = {}
    for name in root.names("**/*"):
        path = PurePosixPath(name)
        is_text, is_image = path.suffix.lower() == ".txt", path.suffix.lower() in IMAGES
        if is_text or is_image:
            _check_name(root, name)
            parent = path.parent.as_posix()
            folder = folders.setdefault("" if parent == "." else parent, Folder())
            (folder.texts if is_text else folder.images).append(path.name)
    folders = _of_split(root, folders, split)
    if not any(folder.images for folder in folders.values()):
        raise PairsError(
            f"pairs.root={root.url} has no images ({', '.join(IMAGES)}); give the folder that has "
            "one folder a prompt, or <id>_<k>.png beside <id>.txt"
        )
    return folders


def _check_name(root: Store, name: str) -> None:
    """Refuse a name that is no text: it would be a prompt, or an image's name in the labels."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise PairsError(
            f"{root.url} has the file {name!r}, whose name is not UTF-8; rename it or its folder"
        ) from error


def _of_split(root: Store, folders: dict[str, Folder], split: str) -> dict[str, Folder]:
    """The folders below the one that is named like the split, or all of them."""
    tops = {path: path.partition("/")[0] for path in folders}
    named = sorted({top for top in tops.values() if WORD.fullmatch(top.lower())})
    if not split and len(named) > 1:
        raise PairsError(
            f"pairs.root={root.url} has folders of the splits {', '.join(named)}; choose one, as "
            f"pairs.split={named[-1]}, or take all of them with pairs.split={EVERY}"
        )
    if not split or (split == EVERY and EVERY not in tops.values()):
        return folders
    chosen = {path: folder for path, folder in folders.items() if tops[path] == split}
    if not chosen:
        there = ", ".join(sorted({*tops.values()} - {""})[:NUM_NAMED]) or "no folder"
        raise PairsError(
            f"pairs.root={root.url} has no folder {split!r} for pairs.split={split}; it has "
            f"{there}; an empty pairs.split takes every folder"
        )
    return chosen


# --- prompts -------------------------------------------------------------------------------------


def _groups(root: Store, folders: Mapping[str, Folder], split: str) -> Iterator[Group]:
    """Each prompt with its images, folder by folder.

    Raises:
        PairsError: There is no text for some images, or are no images for a text.
    """
    by_name = [path for path, folder in folders.items() if folder.images and not folder.texts]
    splits = {split, *(path for path in folders if len(folders) == 1 and WORD.fullmatch(path))}
    if nameless := [path for path in by_name if path in ("", *splits)]:
        where = f"{root.url}/{nameless[0]}".rstrip("/")
        raise PairsError(
            f"{where} has images but no text; put each prompt's images into a folder that is named "
            "by the prompt or has a prompt.txt, or name them <id>_<k>.png beside <id>.txt"
        )
    texted = [path for path, folder in folders.items() if folder.own_text]
    if texted and by_name:
        raise PairsError(
            f"{_listed(root, by_name)} has no prompt.txt or caption.txt, but {root.url}/{texted[0]}"
            " has one; add the missing text, or remove all texts so that folders' names are prompts"
        )
    for path, folder in sorted(folders.items()):
        if folder.own_text:
            yield _whole_folder(root, path, folder)
        elif folder.images and folder.texts:
            yield from _numbered(root, path, folder)
        elif folder.images:
            images = [_join(path, name) for name in sorted(folder.images, key=_natural)]
            yield Group(path, PurePosixPath(path).name, images)


def _whole_folder(root: Store, path: str, folder: Folder) -> Group:
    """The prompt of a folder with a text of its own."""
    if len(folder.texts) > 1:
        raise PairsError(
            f"{root.url}/{path} has {' and '.join(sorted(folder.texts)[:NUM_NAMED])}; keep one "
            "text a folder, or name its images <id>_<k>.png beside <id>.txt"
        )
    (name,) = folder.texts
    images = [_join(path, image) for image in sorted(folder.images, key=_natural)]
    return Group(_join(path, name), _text(root, _join(path, name)), images)


def _numbered(root: Store, path: str, folder: Folder) -> Iterator[Group]:
    """The prompts of a folder with `<id>_<k>.png` beside `<id>.txt`."""
    images: dict[str, list[str]] = {PurePosixPath(name).stem: [] for name in folder.texts}
    if len(images) < len(folder.texts):
        twice = ", ".join(sorted(folder.texts)[:NUM_NAMED])
        raise PairsError(
            f"{root.url}/{path or '.'} has several texts of one name ({twice}); keep one"
        )
    strangers = []
    for name in sorted(folder.images, key=_natural):
        match = NUMBERED.fullmatch(PurePosixPath(name).stem)
        numbered = match is not None and (match["k"] or match["mark"])
        if match is None or not numbered or match["id"] not in images:
            strangers.append(_join(path, name))
        else:
            images[match["id"]].append(_join(path, name))
    if strangers:
        raise PairsError(
            f"{_listed(root, strangers)} has no text: {root.url}/{path or '.'} has "
            f"{sorted(folder.texts)[0]}, so its images are named <id>_<k>.png (or <id>_w.png and "
            "<id>_l.png) beside <id>.txt; add the text, or rename or remove the image"
        )
    for name, members in zip(folder.texts, images.values(), strict=True):
        text = _join(path, name)
        yield Group(text, _text(root, text), members)


def _text(root: Store, name: str) -> str | None:
    """The prompt in a text file; None for an empty one, which becomes rows with a status."""
    where = f"{root.url}/{name}"
    try:
        text = text_of(where, root.read(name, 0, size_of(root, name)), "a prompt").strip()
    except UnreadableError as error:
        raise PairsError(str(error)) from error
    if _is_json(text):
        raise PairsError(f"{where} holds JSON ({shown(text)}), not the text of a prompt")
    return text or None


def _is_json(text: str) -> bool:
    try:
        return text[:1] in ("{", "[") and isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


# --- pairs ---------------------------------------------------------------------------------------


def _check_groups(root: Store, groups: Sequence[Group]) -> None:
    """Refuse prompts that make no pair, and choices that nobody can have meant."""
    if alone := [group for group in groups if len(group.images) < 2]:
        count = len(alone[0].images)
        what = f"one image, {alone[0].images[0]}," if count else "no image"
        others = f", as {len(alone) - 1} more prompts have too few" if len(alone) > 1 else ""
        raise PairsError(
            f"{root.url}/{alone[0].name} has {what} and a pair needs two{others}; add an image, or "
            "remove the prompt"
        )
    for group in groups:
        stems = [PurePosixPath(path).stem for path in group.images]
        if twice := [path for path in group.images if stems.count(PurePosixPath(path).stem) > 1]:
            raise PairsError(f"{_listed(root, twice)}: several images of one name; keep one")
        if both := [p for p, stem in zip(group.images, stems, strict=True)
                    if TWO_MARKS.fullmatch(stem)]:  # fmt: skip
            raise PairsError(f"{_listed(root, both)} is marked twice; end it in _w or in _l")
        marks = [_mark(path) for path in group.images]
        if any(marks) and {"w", "l"} != set(marks):
            odd = next((p for p, m in zip(group.images, marks, strict=True) if not m), "")
            which = f"{odd} has neither" if odd else f"all images end in _{marks[0]}"
            raise PairsError(
                f"{root.url}/{group.name}: winners end in _w and losers in _l, but {which}; mark "
                "every image of the prompt, of each kind at least one, or none"
            )


def _pairs(group: Group, seed: int) -> Iterator[Row]:
    """All pairs of a prompt, with the human choice where one is a winner and one a loser.

    The sides are drawn from (seed, both paths): a place in a list says nothing of an image.
    """
    for left, right in combinations(group.images, 2):
        one, other = (right, left) if is_swapped(seed, left, right) else (left, right)
        marks = _mark(one), _mark(other)
        human = None if marks[0] == marks[1] else float(marks[0] == "w")
        yield group.text, one, other, human


def _shards(rows: Sequence[Row], spec: PairsSpec) -> tuple[PairShard, ...]:
    """Shards of `SHARD_ROWS` pairs, until there are `max_pairs`; each knows what it lists."""
    shards = []
    for number, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        if spec.max_pairs and first >= spec.max_pairs:
            break
        part = rows[first : first + SHARD_ROWS]
        content = "\n".join(map(repr, part)).encode("utf-8", "surrogatepass")
        reading = f"sides by seed {spec.side_seed}, names and texts {sha256(content).hexdigest()}"
        name = f"{SHARD}#{number:05d}"
        shards.append(PairShard(number, name, SHARD, len(part), len(content), first, reading))
    return tuple(shards)


def _mark(path: str) -> str:
    match = MARK.fullmatch(PurePosixPath(path).stem)
    return match["mark"].lower() if match else ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts `a_2` before `a_10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _listed(root: Store, names: Iterable[str]) -> str:
    """The first of some files, and how many more there are."""
    first, *others = names
    more = f" (and {len(others)} more)" if others else ""
    return f"{root.url}/{first}{more}"
