"""HTML reports: one file without scripts that needs no network; `page.html.j2` is their frame."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2


def render(
    template: Path,
    filters: Mapping[str, Callable[..., Any]],
    settings: Mapping[str, Any],
    **values: Any,
) -> bytes:
    """Fill in a template that extends `page.html.j2`; every value is escaped.

    The page ends with the settings and the time.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= filters
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    page = environment.get_template(template.name)
    return page.render(**values, settings=flat(settings), now=now).encode()


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (path, value) lines."""
    if isinstance(value, Mapping):
        return [
            line
            for key, child in value.items()
            for line in flat(child, f"{path}.{key}" if path else str(key))
        ]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
