"""Reads prompts from text files, tables, JSON, published sets and pair files, local or hub."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.pairs.files import refuse_mixed, shortened
from data.pairs.kinds import NAME, TEXT, check_types, json_value, shown
from data.pairs.parquet_file import open_file, read_columns
from data.pairs.splits import files_of_split, splits_of
from data.storage import open_store
from data.storage.base import Store
from data.storage.hub import HubError, Wanted, resolve
from generate.config import PromptsKind, PromptsSpec
from generate.prompts.text_files import (
    PromptsError,
    csv_rows,
    json_lines,
    json_list,
    lines_of,
    tsv_rows,
)

COLUMNS = ("prompt", "caption")
"""The columns that hold a table's prompts when none is named; case is ignored."""
BREAKDOWNS = ("category", "challenge")
JUDGE = "evaluate.prompts"
"""The section of the settings of the prompts that models are judged on."""


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


def read_prompts(spec: PromptsSpec, pairs: PairsSpec, section: str = JUDGE) -> Iterator[Prompt]:
    """Every row of the set, including empty and repeated ones; `pairs` are what the run trains on.

    `section` names the settings in messages.

    Raises:
        PromptsError: The file is missing or has another layout.
    """
    if spec.kind is PromptsKind.miniature:
        return _miniature(spec, section)
    if spec.kind is PromptsKind.pairs:
        return _of_pairs(spec, pairs)
    path = located(spec, section)
    if spec.kind is PromptsKind.lines:
        return _lines(path)
    if spec.kind is PromptsKind.hpd:
        return _hpd(path, section)
    return _table(path, spec, section)


def trained_prompts(pairs: PairsSpec) -> set[str]:
    """The `wording` of every prompt that a run trains on; no image is read."""
    return {wording(text) for text in _pair_prompts(pairs)}


def wording(text: str) -> str:
    """The prompt without the differences that do not count: case and whitespace."""
    return " ".join(text.casefold().split())


# --- layouts -------------------------------------------------------------------------------------


def _miniature(spec: PromptsSpec, section: str) -> Iterator[Prompt]:
    from data.miniature import scenes  # imports PIL, so only for this kind

    held_out = ("test", "validation")
    if spec.split not in (held_out if section == JUDGE else (*held_out, "train")):
        raise PromptsError(
            f"{section}.split={spec.split!r}; the miniature world's held-out prompts "
            "are in test and validation, and those to train on in train"
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
    for index, line in enumerate(lines_of(path)):
        yield Prompt(index, line.strip())


def _hpd(path: Path, section: str) -> Iterator[Prompt]:
    files = [path]
    if path.is_dir():
        store = open_store(f"{section}.path", str(path))
        files = [path / name for name in store.names("*.json")]
    index = 0
    for file in files:
        for text in json_list(file):
            if not isinstance(text, str):
                raise PromptsError(f"{file} holds {shown(text)}; expected a JSON list of strings")
            yield Prompt(index, text.strip(), category=file.stem)
            index += 1


def _table(path: Path, spec: PromptsSpec, section: str) -> Iterator[Prompt]:
    column = spec.column or ("Prompt" if spec.kind is PromptsKind.parti else "")
    for index, row in enumerate(_records(path, spec, column, section)):
        where = f"{path}, row {index}"
        if isinstance(row, str):
            yield Prompt(index, row.strip())
            continue
        if not isinstance(row, dict):
            raise PromptsError(f"{where} is {shown(row)}; expected a record with a prompt")
        named = {str(key).casefold(): value for key, value in row.items()}
        name = _column(where, column, list(row), section).casefold()
        text = json_value(where, f"the prompt in {name!r}", named[name], TEXT)
        labels = [json_value(where, word, named.get(word), NAME) or None for word in BREAKDOWNS]
        yield Prompt(index, (text or "").strip(), *labels)


def _records(path: Path, spec: PromptsSpec, column: str, section: str) -> Iterable[Any]:
    """The rows of a file, or of a folder's Parquet files of one split."""
    suffix = path.suffix.lower()
    if path.is_dir():
        store = open_store(f"{section}.path", str(path))
        files = _files_of(store, path, spec.split, section)
        return (row for file in files for row in _parquet(store, file, column, section))
    if suffix == ".parquet":
        store = open_store(f"{section}.path", str(path.parent))
        return _parquet(store, path.name, column, section)
    if suffix == ".jsonl":
        return json_lines(path)
    if suffix == ".json":
        return json_list(path)
    if suffix == ".csv":
        return csv_rows(path)
    if suffix == ".tsv" or spec.kind is PromptsKind.parti:
        return tsv_rows(path)
    raise PromptsError(
        f"{path} ends in {path.suffix or 'nothing'}; tables are .parquet, .json, .jsonl, .tsv and "
        ".csv, and a text file with one prompt a line is read with prompts=lines"
    )


def _files_of(store: Store, path: Path, split: str, section: str) -> list[str]:
    names = store.names("**/*.parquet")
    if not split:
        refuse_mixed(f"{section}.path={path}", f"{section}.split", splits_of(names))
    files = files_of_split(names, split, path.name)
    if not files:
        raise PromptsError(
            f"{path} has no {split}*.parquet; name the split with "
            f"{section}.split=... or a file with {section}.path=..."
        )
    return files


def _parquet(store: Store, file: str, column: str, section: str) -> list[dict[str, Any]]:
    """Rows with the columns that are used; a pair file also has columns of images."""
    where = f"{store.url}/{file}"
    with open_file(store, file) as opened:
        schema = opened.schema_arrow
    prompt = _column(where, column, schema.names, section)
    kinds = {name: NAME for name in schema.names if name.casefold() in BREAKDOWNS}
    kinds[prompt] = TEXT
    check_types(where, schema, {name: name for name in kinds}, kinds)
    rows: list[dict[str, Any]] = read_columns(store, file, kinds).to_pylist()
    return rows


def _column(where: str, wanted: str, names: list[str], section: str) -> str:
    for choice in [wanted] if wanted else COLUMNS:
        fitting = [name for name in names if name.casefold() == choice.casefold()]
        if len(fitting) > 1:
            raise PromptsError(
                f"{where} has the columns {', '.join(fitting)}; rename or remove one"
            )
        if fitting:
            return fitting[0]
    raise PromptsError(
        f"{where} has the columns {shortened(names)} but not {wanted or ' or '.join(COLUMNS)}; "
        f"name one with {section}.column=..."
    )


# --- files ---------------------------------------------------------------------------------------


def located(spec: PromptsSpec, section: str = JUDGE) -> Path:
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
        return resolve(f"{section}.path", spec.path, spec.revision, wanted)
    except HubError as error:
        raise PromptsError(str(error)) from error
