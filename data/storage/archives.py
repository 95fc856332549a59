"""Images inside .tar and .zip files, which are read in place and never unpacked.

An archive is a list of names and places. Names that lead out of it, and whatever else no image
set needs, are refused before a single image is read.
"""

import json
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from data.artifacts.atomic import ShardError, write_json
from data.storage.base import Store, StoreError
from data.storage.paths import cache_folder

LARGEST_BYTES = 256 << 20
"""Larger members are not read at all: no encoded image is that large, and bombs are."""
ZIP_HEADER = struct.Struct("<4s2xHH8x8xHH")
"""Of a member: signature, flags, method, lengths of name and extra field; 30 bytes."""
SLACK_BYTES = 1024
"""Fetched beyond a member, so that its header's length need not be read first."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an encoded image lies: a whole file, or a member of an archive."""

    file: str
    offset: int
    bytes: int
    zipped: int | None = None
    """Bytes that a zip has of it, behind the header at `offset`; None outside of zips."""
    crc: int = 0


def members(store: Store, archives: Iterable[str]) -> dict[str, Place]:
    """The regular files of all archives by path.

    A path in two of them would be a guess and is left out. `x.zip` also stands for a folder `x`:
    some are packed with it, some without.
    """
    places: dict[str, Place] = {}
    twice = set()
    for archive in archives:
        folder, stem = PurePosixPath(archive).parent, PurePosixPath(archive).stem
        for name, place in listed(store, archive):
            paths = [folder / name]
            if archive.endswith(".zip") and PurePosixPath(name).parts[0] != stem:
                paths.append(folder / stem / name)
            for path in map(PurePosixPath.as_posix, paths):
                if path in places:
                    twice.add(path)
                places[path] = place
    for name in twice:
        del places[name]
    return places


def listed(store: Store, archive: str) -> Iterator[tuple[str, Place]]:
    """The regular files of an archive, in its order."""
    if archive.endswith(".zip"):
        yield from _scan_zip(store, archive)
    else:
        for name, (offset, size) in _indexed_tar(store, archive).items():
            yield name, Place(archive, offset, size)


# --- zip -----------------------------------------------------------------------------------------


def _scan_zip(store: Store, archive: str) -> Iterator[tuple[str, Place]]:
    where = f"{store.url}/{archive}"
    try:
        with store.open(archive) as file, zipfile.ZipFile(file) as opened:
            for member in opened.infolist():
                _check_zip_member(where, member)
                linked = stat.S_ISLNK(member.external_attr >> 16)
                if not (member.is_dir() or linked):
                    size, packed = member.file_size, member.compress_size
                    place = Place(archive, member.header_offset, size, packed, member.CRC)
                    yield PurePosixPath(member.filename).as_posix(), place
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        store.refuse_pointer(archive)
        raise StoreError(f"{where} is not a readable zip file: {error}") from error


def _check_zip_member(where: str, member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    problem = ""
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        problem = f"{member.filename!r} leads out of the archive"
    elif member.flag_bits & 1:
        problem = f"{member.filename!r} is encrypted"
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"{member.filename!r} is packed by method {member.compress_type}"
    if problem:
        raise StoreError(_refusal(where, problem))


def unzip(store: Store, place: Place) -> bytes:
    """A member of a zip.

    Raises:
        StoreError: It is damaged.
    """
    assert place.zipped is not None
    header, slack = ZIP_HEADER.size, SLACK_BYTES
    content = store.read(place.file, place.offset, header + place.zipped + slack)
    try:
        signature, _, method, *lengths = ZIP_HEADER.unpack_from(content)
        start = header + sum(lengths)
        if signature != b"PK\3\4":
            raise zlib.error("there is no member where the list says")  # noqa: TRY301
        if sum(lengths) > slack:
            content = store.read(place.file, place.offset, start + place.zipped)
        packed = content[start : start + place.zipped]
        whole = packed
        if method == zipfile.ZIP_DEFLATED:
            whole = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, place.bytes + 1)
        if len(whole) != place.bytes or zlib.crc32(whole) != place.crc:
            raise zlib.error("its bytes are not those that were packed")  # noqa: TRY301
    except (zlib.error, struct.error) as error:
        raise StoreError(
            f"{store.url}/{place.file}: the member at byte {place.offset} is damaged ({error}); "
            "fetch the file again"
        ) from error
    return whole


# --- tar -----------------------------------------------------------------------------------------


def _indexed_tar(store: Store, tar: str) -> dict[str, list[int]]:
    """Offset and size by name, from the stored index; built when there is none."""
    index, stamp = _index_path(store, tar), store.state(tar)
    places = _read_index(index, stamp)
    if places is None:
        places = dict(_scan_tar(store, tar))
        with suppress(OSError, ShardError):  # a read-only place is scanned every time
            write_json(index, {**stamp, "members": places})
    return places


def _index_path(store: Store, tar: str) -> Path:
    """The index lies beside a local tar, or in the user's cache for one in an object store."""
    if not store.remote:
        return Path(store.folder) / f"{tar}.index"
    return cache_folder() / f"{sha256(f'{store.url}/{tar}'.encode()).hexdigest()}.index"


def _read_index(index: Path, stamp: dict[str, object]) -> dict[str, list[int]] | None:
    """The index, or None when there is none, or one of other bytes."""
    try:
        value = json.loads(index.read_text())
        if any(value[key] != stamp[key] for key in stamp):
            return None
        places = {str(name): [int(a), int(b)] for name, (a, b) in value["members"].items()}
        size = int(str(stamp["bytes"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return places if all(a >= 0 and 0 <= b <= size - a for a, b in places.values()) else None


def _scan_tar(store: Store, tar: str) -> Iterator[tuple[str, list[int]]]:
    """Name, offset and size of every regular file; links and sparse files are left out."""
    where = f"{store.url}/{tar}"
    try:
        with store.open(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _check_tar_member(where, member)
                if member.isreg() and not member.issparse():
                    name = PurePosixPath(member.name).as_posix()
                    yield name, [member.offset_data, member.size]
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
    except (tarfile.ReadError, EOFError) as error:
        store.refuse_pointer(tar)
        raise StoreError(f"{where} is not a readable tar file: {error}") from error


def _check_tar_member(where: str, member: tarfile.TarInfo) -> None:
    try:
        if member.name.startswith("/"):  # the filter would cut the slash off
            raise tarfile.AbsolutePathError(member)
        tarfile.data_filter(member, "/nowhere")
    except tarfile.FilterError as error:
        raise StoreError(_refusal(where, str(error))) from error


def _refusal(where: str, problem: str) -> str:
    return (
        f"{where} has a member that no image set needs ({problem}); it was not made for this "
        "purpose or cannot be trusted: pack the images again"
    )
