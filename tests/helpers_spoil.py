"""Ways to spoil any file."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from data.artifacts.readable import LFS_HEAD

POINTER = LFS_HEAD + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 480000000\n"
Spoil = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def scramble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def point(path: Path) -> None:
    path.write_bytes(POINTER)


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name(f"old-{path.name}"))


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def break_the_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def save_a_page(path: Path) -> None:
    """What a download behind a login saves."""
    path.write_text("<!doctype html><title>Sign in</title>")


def forbid(path: Path) -> None:
    path.chmod(0)


ANY_FILE: tuple[Spoil, ...] = (
    truncate, empty, zero, scramble, point, remove, rename, put_a_folder, break_the_link,
    save_a_page, *(() if os.geteuid() == 0 else (forbid,)),
)  # fmt: skip
