"""The page in docs/ that the results are written into, between two marks."""

import re
from pathlib import Path

from data.artifacts.atomic import write_bytes

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def check_page(page: Path) -> None:
    """Refuse a page that has no place for results, before anything is trained.

    Raises:
        ValueError: The page is not there or has no marks.
    """
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"--docs {page} has no line {BEGIN!r} followed by {END!r} to put the results between"
        )


def publish(page: Path, text: str, images: list[Path]) -> None:
    """Put text and images between the marks; all else in the page is left as it is."""
    check_page(page)
    links = [
        f"![{path.stem.replace('-', ' ')}]({path.relative_to(page.parent)})" for path in images
    ]
    made = "\n\n".join([BEGIN, text, *links, END])
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    written = re.sub(pattern, lambda _: made, page.read_text(), flags=re.DOTALL)
    write_bytes(page, written.encode())
