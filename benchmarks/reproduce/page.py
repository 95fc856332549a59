"""Writes the results into a page of docs/, between two marks."""

import re
from pathlib import Path

from data.artifacts.atomic import write_bytes

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def check_page(page: Path) -> None:
    """Refuse a page that has no place for results, before anything is trained.

    Raises:
        ValueError: The page does not exist or has no marks.
    """
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"--docs {page} has no line {BEGIN!r} followed by {END!r} to put the results between"
        )


def publish(page: Path, text: str, images: list[Path]) -> None:
    """Replace what is between the marks by text and images; the rest of the page stays."""
    check_page(page)
    links = [
        f"![{path.stem.replace('-', ' ')}]({path.relative_to(page.parent)})" for path in images
    ]
    section = "\n\n".join([BEGIN, text, *links, END])
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    written = re.sub(pattern, lambda _: section, page.read_text(), flags=re.DOTALL)
    write_bytes(page, written.encode())
