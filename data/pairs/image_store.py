"""Image files that pairs name by path: in a folder, or in archives that are never unpacked.

A path decides which file is read, so none may lead out of the folder; an image that is not there
is None and its pair keeps its row. A disk or store that fails gives no answer: it ends the run.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data.artifacts.readable import LFS_HEAD, LFS_POINTER, is_lfs_pointer
from data.pairs.kinds import shown
from data.pairs.schema import PairsError
from data.storage.archives import LARGEST_BYTES, Place, members, unzip
from data.storage.base import AWAY, THREADS, Store, StoreError

NUM_TRIED = 16
"""Images looked for before a run, so that a wrong folder is noticed at once."""
ARCHIVES = ("*.tar", "*.zip")
"""Where archives are looked for, below the folder of images."""
PACKED = ("*.tar.*", "*.tgz")
"""Archives that cannot be read from the middle."""


@dataclass(frozen=True, slots=True)
class ImageStore:
    """The image files of a pair set."""

    store: Store
    prefixes: tuple[str, ...] = ("",)
    """Folders below the store's in which a path is looked for, in this order."""
    members: dict[str, Place] = field(default_factory=dict)

    def read(self, path: str) -> bytes | None:
        """The encoded image, or None when there is no such file below the folder.

        Raises:
            StoreError: The disk or the store fails, or the archive is damaged.
        """
        place = self._find(path)
        if place is None or max(place.bytes, place.zipped or 0) > LARGEST_BYTES:
            return None
        try:
            if place.zipped is not None:
                return unzip(self.store, place)
            content = self.store.read(place.file, place.offset, place.bytes)
        except AWAY:
            return None  # deleted in the meantime
        if len(content) < place.bytes:
            raise StoreError(
                f"{self.store.url}/{place.file} became shorter while it was read; rerun the same "
                "command"
            )
        return content

    def read_all(self, values: Sequence[str | bytes | None]) -> list[bytes | None]:
        """Read images by path, remote ones side by side; bytes and None stay as they are."""

        def content(value: str | bytes | None) -> bytes | None:
            return self.read(value) if isinstance(value, str) else value

        if not self.store.remote:
            return [content(value) for value in values]
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(content, values))

    def bytes_of(self, path: str) -> int:
        """The encoded image's size; 0 when there is none."""
        place = self._find(path)
        return place.bytes if place else 0

    def _find(self, path: str) -> Place | None:
        name = self._below_root(path)
        if name is None:
            return None
        for prefix in self.prefixes:
            within = (PurePosixPath(prefix) / name).as_posix()
            if within in self.members:
                return self.members[within]
            if (size := self.store.size(within)) is not None:
                return Place(within, 0, size)
        return None

    def _below_root(self, path: str) -> str | None:
        """The path relative to the folder, or None when it leads out of it."""
        parts = PurePosixPath(path.removeprefix(f"{self.store.url}/"))
        if parts.is_absolute() and not self.store.remote:
            root = Path(self.store.folder).absolute()
            if not parts.is_relative_to(root):
                return None
            parts = parts.relative_to(root)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            return None
        return parts.as_posix()


def open_images(
    store: Store,
    prefixes: tuple[str, ...],
    tried: Sequence[str | None],
    archives: Sequence[str] = ARCHIVES,
) -> ImageStore:
    """The images below a folder, in archives too.

    `tried` are some of the set's paths; a set that has none of these images is refused.

    Raises:
        PairsError: No image is there, they are in a .tar.gz or Git LFS pointers, or an archive is
            torn or hostile.
    """
    names = [name for pattern in archives for name in store.names(pattern)]
    images = ImageStore(store, prefixes, members(store, names))
    named = [path for path in tried if path]
    there = [path for path in named if images.bytes_of(path)]
    if named and not there:
        _refuse(store, named[0])
    if there and is_lfs_pointer((images.read(there[0]) or b"")[: len(LFS_HEAD)]):
        raise PairsError(f"the image {store.url}/{there[0]} {LFS_POINTER}")
    return images


def _refuse(store: Store, example: str) -> None:
    packed = sorted(name for pattern in PACKED for name in store.names(pattern))
    packed = [name for name in packed if not name.endswith(".index")]
    if packed:
        name = packed[0].split(".t")[0]
        raise PairsError(
            f"the images under {store.url} are in {packed[0]}, and a compressed tar cannot be "
            f"read from the middle; convert it once: cd {store.url} && cat {name}.t*gz* | gunzip > "
            f"{name}.tar"
        )
    raise PairsError(
        f"none of the first images is under {store.url}, for example {shown(example)}; give the "
        "folder that the paths are relative to, or that has the .tar or .zip files "
        "(pairs.image_root=...)"
    )
