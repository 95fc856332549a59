"""Reads prompts from text files, tables, JSON, published sets and pair files, local or hub."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.storage.hub import HubError, Wanted, resolve
from generate.config import PromptsKind, PromptsSpec

COLUMNS = ("prompt", "caption")
"""The columns that hold a table's prompts when none is named; case is ignored."""


class PromptsError(ValueError):
    """The prompt set cannot be used; the message says what was found and what is needed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a set."""

    id: int
    """Its row in the source, counted from 0 and including the rows left out."""
    text: str
    category: str | None = None
    """Style or subject, if the set has categories."""
    challenge: str | None = None
    """What makes it hard, if the set says so (PartiPrompts)."""


def read_prompts(spec: PromptsSpec, pairs: PairsSpec) -> Iterator[Prompt]:
    """Every row of the set, including empty and repeated ones; `pairs` are what the run trains on.

    Raises:
        PromptsError: The file is missing or has another layout.
    """
    if spec.kind is PromptsKind.miniature:
        return _miniature(spec)
    if spec.kind is PromptsKind.pairs:
        return _of_pairs(spec, pairs)
    path = located(spec)
    if spec.kind is PromptsKind.lines:
        return _lines(path)
    return _hpd(path) if spec.kind is PromptsKind.hpd else _table(path, spec)


def trained_prompts(pairs: PairsSpec) -> set[str]:
    """The `wording` of every prompt that a run trains on; no image is read."""
    return {wording(text) for text in _pair_prompts(pairs)}


def wording(text: str) -> str:
    """The prompt without the differences that do not count: case and whitespace."""
    return " ".join(text.casefold().split())


# --- layouts -------------------------------------------------------------------------------------


def _miniature(spec: PromptsSpec) -> Iterator[Prompt]:
    from data.miniature import scenes  # imports PIL, so only for this kind

    if spec.split not in ("test", "validation"):
        raise PromptsError(
            f"evaluate.prompts.split={spec.split!r}; the miniature world's held-out prompts "
            "are in test and validation"
        )
    for index, text in enumerate(scenes.prompts(spec.split)):  # type: ignore[arg-type]
        yield Prompt(index, text)


def _of_pairs(spec: PromptsSpec, pairs: PairsSpec) -> Iterator[Prompt]:
    if not spec.split:
        raise PromptsError(
            "evaluate.prompts.split is empty; name the split of the pair files to take prompts "
            "from, such as evaluate.prompts.split=validation"
        )
    for index, text in enumerate(_pair_prompts(replace(pairs, split=spec.split, max_pairs=0))):
        yield Prompt(index, text.strip())


def _pair_prompts(pairs: PairsSpec) -> Iterator[str]:
    source = open_pairs(pairs)
    for shard in source.shards:
        for table in source.read(shard, images=False, batch_rows=8192):
            yield from (text or "" for text in table["prompt"].to_pylist())


def _lines(path: Path) -> Iterator[Prompt]:
    for index, line in enumerate(_read(path).removesuffix("\n").split("\n")):
        yield Prompt(index, line.strip())


def _hpd(path: Path) -> Iterator[Prompt]:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    index = 0
    for file in files:
        for text in _json_list(file):
            if not isinstance(text, str):
                raise PromptsError(f"{file} holds {text!r}; expected a JSON list of strings")
            yield Prompt(index, text.strip(), category=file.stem)
            index += 1


def _table(path: Path, spec: PromptsSpec) -> Iterator[Prompt]:
    column = spec.column or ("Prompt" if spec.kind is PromptsKind.parti else "")
    for index, row in enumerate(_records(path, spec)):
        if isinstance(row, str):
            yield Prompt(index, row.strip())
            continue
        if not isinstance(row, dict):
            raise PromptsError(f"{path} holds {row!r}; expected records with a column of prompts")
        named = {str(key).casefold(): value for key, value in row.items()}
        text = named[_column(path, column, list(row)).casefold()]
        if not isinstance(text, str | None):
            raise PromptsError(f"{path}, row {index} has the prompt {text!r}; expected text")
        kept = [_text(named.get(name)) for name in ("category", "challenge")]
        yield Prompt(index, (text or "").strip(), *kept)


def _records(path: Path, spec: PromptsSpec) -> Iterable[Any]:
    """The rows of a file, or of a folder's Parquet files of one split."""
    if path.is_dir():
        files = [
            file for file in sorted(path.glob("*.parquet")) if file.name.startswith(spec.split)
        ]
        if not files:
            raise PromptsError(
                f"{path} has no {spec.split}*.parquet; name the split with "
                "evaluate.prompts.split=... or a file with evaluate.prompts.path=..."
            )
        return (row for file in files for row in _parquet(file, spec.column))
    if path.suffix == ".parquet":
        return _parquet(path, spec.column)
    if path.suffix == ".jsonl":
        return (_parse(path, line) for line in _read(path).split("\n") if line.strip())
    if path.suffix == ".json":
        return _json_list(path)
    if path.suffix in (".tsv", ".csv") or spec.kind is PromptsKind.parti:
        return _separated(path)
    raise PromptsError(
        f"{path} ends in {path.suffix or 'nothing'}; tables are .parquet, .json, .jsonl, .tsv and "
        ".csv, and a text file with one prompt a line is read with prompts=lines"
    )


def _parquet(path: Path, column: str) -> list[dict[str, Any]]:
    """Rows with the columns that are used; a pair file also has columns of images."""
    import polars as pl

    names = list(pl.read_parquet_schema(path))
    wanted = {_column(path, column, names).casefold(), "category", "challenge"}
    return pl.read_parquet(
        path, columns=[name for name in names if name.casefold() in wanted]
    ).to_dicts()


def _separated(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a TSV or CSV; in a TSV quotes are ordinary characters, as PartiPrompts needs."""
    lines = _read(path).replace("\r", "").split("\n")  # splitlines() would cut at rare characters
    if path.suffix == ".csv":
        return csv.DictReader([line + "\n" for line in lines])  # a quoted text may span lines
    return csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _column(path: Path, wanted: str, names: list[str]) -> str:
    for choice in [wanted] if wanted else COLUMNS:
        for name in names:
            if name.casefold() == choice.casefold():
                return name
    raise PromptsError(
        f"{path} has the columns {', '.join(names)} but not {wanted or ' or '.join(COLUMNS)}; "
        "name one with evaluate.prompts.column=..."
    )


def _text(value: Any) -> str | None:
    return str(value) if value not in (None, "") else None


# --- files ---------------------------------------------------------------------------------------


def located(spec: PromptsSpec) -> Path:
    """The set's file or folder; one of a hub data set is fetched at its commit.

    Raises:
        PromptsError: It is neither here nor named with a commit, or cannot be fetched.
    """
    folder_too = spec.kind in (PromptsKind.hpd, PromptsKind.table)
    wanted = Wanted(
        repository="dataset",
        usable=lambda path: path.is_file() or (folder_too and path.is_dir()),
        missing=f" is no file to read the prompt set {spec.name!r} from; give one, or "
        "owner/name/file of a hub data set",
    )
    try:
        return resolve("evaluate.prompts.path", spec.path, spec.revision, wanted)
    except HubError as error:
        raise PromptsError(str(error)) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{path} is no JSON: {error}") from error


def _json_list(path: Path) -> list[Any]:
    value = _parse(path, _read(path))
    if not isinstance(value, list):
        raise PromptsError(f"{path} holds a JSON {type(value).__name__}; expected a list")
    return value
