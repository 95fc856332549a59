"""Whether a file can be read at all, before a library is given it: what is wrong, in words."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = (
    "is a Git LFS pointer, not the file itself; run `git lfs pull` in the repository that it comes "
    "from, or fetch the file again"
)
"""What is said of a file whose content was left on the Git server."""
PAGE = re.compile(r"\s*<(!doctype|html|\?xml)\b", re.IGNORECASE)


class UnreadableError(ValueError):
    """A file cannot be read; the message names it and says what it is instead."""


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a Git LFS pointer."""
    return head.startswith(LFS_HEAD)


def problem_of(path: Path) -> str:
    """Why a file cannot be read, as the end of a sentence that names it; empty where it can."""
    if not path.exists():
        return "is not there; fetch or copy it to this place"
    if path.is_dir():
        return "is a folder, not a file"
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_HEAD))
    except OSError as error:
        return f"cannot be opened ({error.strerror}); make it readable"
    if not head:
        return "is empty; fetch it again"
    return LFS_POINTER if is_lfs_pointer(head) else ""


def check_readable(path: Path, what: str = "") -> None:
    """Refuse a file that is missing, empty, a folder, or a Git LFS pointer.

    Raises:
        UnreadableError: Begins with `what`, if any, and names the file.
    """
    if problem := problem_of(path):
        raise UnreadableError(f"{what}{': ' if what else ''}{path} {problem}")


def text_of(where: str, content: bytes, what: str) -> str:
    """The text in a file's bytes, with plain newlines; `what` is what the file should hold.

    Raises:
        UnreadableError: It is damaged, or is no text; begins with `where`.
    """
    if is_lfs_pointer(content):
        raise UnreadableError(f"{where} {LFS_POINTER}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"{where} cannot be read as UTF-8 text: {error}; save it as UTF-8"
        ) from error
    if "\0" in text:
        row = text[: text.index("\0")].count("\n")
        raise UnreadableError(f"{where}, line {row + 1} has a NUL byte: it is damaged, or no text")
    if PAGE.match(text):
        raise UnreadableError(f"{where} is a web page, not {what}; fetch the file again")
    return text.replace("\r\n", "\n")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Say which file of a folder cannot be read.

    Raises:
        UnreadableError: Begins with `what` and names the file, if the system did.
    """
    try:
        yield
    except OSError as error:
        raise UnreadableError(
            f"{what}: {error.filename or 'a file'} cannot be read ({error.strerror or error}); "
            "make it readable, or fetch it again"
        ) from error


def read_json_object(path: Path, what: str = "") -> dict[str, Any]:
    """A JSON object, such as a configuration file.

    Raises:
        UnreadableError: Begins with `what`, if any, and names the file.
    """
    check_readable(path, what)
    begin = f"{what}{': ' if what else ''}{path}"
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(
            f"{begin} cannot be read as JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise UnreadableError(
            f"{begin} holds a JSON {type(value).__name__}, needed is an object; fetch it again"
        )
    return value
