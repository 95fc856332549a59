"""Writes the results of a study into its part of a page of docs/, between two marks."""

import re
from pathlib import Path

from data.artifacts.atomic import write_bytes


def marks(part: str) -> tuple[str, str]:
    """The lines before and after a part of the page."""
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"


def check_page(page: Path, part: str) -> None:
    """Refuse a page that has no place for results, before anything is trained.

    Raises:
        ValueError: The page does not exist or has no marks.
    """
    text = page.read_text() if page.exists() else ""
    begin, end = marks(part)
    if begin not in text or end not in text:
        raise ValueError(
            f"--docs {page} has no line {begin!r} followed by {end!r} to put the results between"
        )


def publish(page: Path, part: str, text: str, images: list[Path]) -> None:
    """Replace what is between the marks by text and images; the rest of the page stays."""
    check_page(page, part)
    begin, end = marks(part)
    links = [
        f"![{path.stem.replace('-', ' ')}]({path.relative_to(page.parent)})" for path in images
    ]
    section = "\n\n".join([begin, text, *links, end])
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    written = re.sub(pattern, lambda _: section, page.read_text(), flags=re.DOTALL)
    write_bytes(page, written.encode())
