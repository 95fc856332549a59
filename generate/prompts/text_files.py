"""Text of prompt files: read whole or refused, and cut into rows without guessing."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.artifacts.readable import UnreadableError, text_of
from data.pairs.kinds import shown

WAY_OUT = (
    'put the text into quotes, as "a red cat, sitting" (a quote inside it twice), or make the file '
    "a text file with one prompt a line and no header, for prompts=lines"
)
LONGEST_CELL = 131_072
"""Characters; no prompt is that long, but what follows a quote that nobody closed is."""


class PromptsError(ValueError):
    """The prompt set cannot be used; the message says what is wrong and what is needed."""


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        PromptsError: It cannot be read, is damaged, or is no text.
    """
    try:
        return text_of(str(path), path.read_bytes(), "a list of prompts")
    except OSError as error:
        raise PromptsError(f"{path} cannot be read as UTF-8 text: {error}") from error
    except UnreadableError as error:
        raise PromptsError(str(error)) from error


# --- lines ---------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, one prompt each.

    Raises:
        PromptsError: It is a table.
    """
    text = read_text(path)
    lines = text.removesuffix("\n").split("\n")
    table = path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl")
    header = {"prompt", "caption"} & set(re.split(r"[,;\t]", lines[0].strip().casefold()))
    if table or header or any(_is_json(part) for part in (lines[0], text)):
        raise PromptsError(
            f"{path} is a table or JSON ({shown(lines[0])}), of which each line would be taken for "
            "a prompt; read it with prompts=table, or keep only its prompts in a .txt file"
        )
    return lines


def _is_json(text: str) -> bool:
    try:
        return text.lstrip()[:1] in ("[", "{") and isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


# --- JSON ----------------------------------------------------------------------------------------


def parse(where: str, text: str) -> Any:
    """A JSON value.

    Raises:
        PromptsError: It is none; begins with `where`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptsError(f"{where} is no JSON: {error}") from error


def json_list(path: Path) -> list[Any]:
    """The elements of a JSON list.

    Raises:
        PromptsError: It is no list.
    """
    value = parse(str(path), read_text(path))
    if not isinstance(value, list):
        raise PromptsError(f"{path} holds a JSON {type(value).__name__}; expected a list")
    return value


def json_lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line that is not empty.

    Raises:
        PromptsError: One is none; names the line.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield parse(f"{path}, line {number}", line)


# --- CSV and TSV ---------------------------------------------------------------------------------


def tsv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a TSV, where quotes are ordinary characters, as PartiPrompts needs.

    Raises:
        PromptsError: A row has more cells than the header; names the row.
    """
    header, *lines = read_text(path).replace("\r", "").removesuffix("\n").split("\n")
    names = _header(path, header.split("\t"))
    for number, line in enumerate(lines):
        cells = line.split("\t")
        if len(cells) > len(names):
            raise PromptsError(_wrong_count(path, number, cells, names))
        if line:
            yield dict.fromkeys(names) | dict(zip(names, cells, strict=False))


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV; a file of one column without quotes is read line by line, commas and all.

    Raises:
        PromptsError: A row has other cells than the header, or a quote is not closed; names it.
    """
    text = read_text(path).replace("\r", "\n")
    lines = text.split("\n")  # splitlines() would cut at rare characters
    if "," not in lines[0] and '"' not in text:
        (name,) = _header(path, [lines[0]])
        yield from ({name: line} for line in lines[1:] if line)
        return
    records = _records(path, lines)
    names = _header(path, next(records, [""]))
    for number, cells in enumerate(records):
        if len(cells) != len(names):
            raise PromptsError(_wrong_count(path, number, cells, names))
        yield dict(zip(names, cells, strict=True))


def _records(path: Path, lines: Sequence[str]) -> Iterator[list[str]]:
    """The cells of each record that is not empty; a quoted one may span lines."""
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    number, first = -1, 1
    while True:
        try:
            if (cells := next(reader, None)) is None:
                return
        except csv.Error as error:
            where = f"{path}, row {max(number, 0)} (line {first})"
            raise PromptsError(f"{where} cannot be read: {_words(error)}; {WAY_OUT}") from error
        if cells:
            _check_cells(path, number, cells, lines[first - 1])
            yield cells
            number += 1
        first = reader.line_num + 1


def _check_cells(path: Path, number: int, cells: Sequence[str], line: str) -> None:
    """Refuse a cell that looks like the rest of a sentence, cut at a comma nobody quoted."""
    if any(cell[:1] == " " and f",{cell}" in line for cell in cells[1:]):
        what = "the header" if number < 0 else f"row {number}"
        raise PromptsError(
            f"{path}, {what} has a space after a comma outside quotes ({shown(line)}), so that the "
            f"comma may be one of the text; {WAY_OUT}; write no space after the commas between "
            "cells"
        )


def _header(path: Path, names: Sequence[str]) -> list[str]:
    names = [name.strip() for name in names]
    folded = [name.casefold() for name in names]
    if twice := [name for name in names if folded.count(name.casefold()) > 1]:
        raise PromptsError(f"{path} has several columns {twice[0]!r}; rename or remove one")
    return names


def _wrong_count(path: Path, number: int, cells: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"{path}, row {number} has {len(cells)} cells ({shown(cells[0])}, ...), but the header has "
        f"{len(names)} ({shown(', '.join(names))}); if a text has a comma or a tab, {WAY_OUT}"
    )


def _words(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "its quote is never closed"
    if "field limit" in str(error):
        return f"a cell has more than {LONGEST_CELL} characters, as if its quote were never closed"
    return f"a quote inside a text ({error})"
