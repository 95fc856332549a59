"""Spoiled pair files of every layout and spoiled prompt files: refused in words, or read rightly.

Each case spoils one file of a small set that is sound. Nothing may end in another error than a
`ValueError` that names the file or the setting, and no row may mean something else: a row that is
read is one of the sound set's, or one whose spoiled part is null.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.pairs import open_pairs
from data.pairs.config import Images, PairsSpec
from generate.config import PromptsKind, PromptsSpec
from generate.prompts.prompt_set import load_prompts
from tests.helpers_pairs import KINDS, make_set

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 4800\n".encode()
Outcome = list[tuple[Any, ...]]


# --- what can happen to a file -------------------------------------------------------------------


def truncated(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def zeroed(path: Path, start: float) -> None:
    content = path.read_bytes()
    at = int(len(content) * start)
    end = at + max(1, len(content) // 4)
    path.write_bytes(content[:at] + bytes(len(content[at:end])) + content[end:])


def replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name(f"other-{path.name}"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("../objects/gone")


def unreadable(path: Path) -> None:
    path.chmod(0)


SPOILS: dict[str, Callable[[Path], None]] = {
    "truncated to nothing": lambda path: truncated(path, 0),
    "truncated to a half": lambda path: truncated(path, 0.5),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed at the start": lambda path: zeroed(path, 0),
    "zeroed in the middle": lambda path: zeroed(path, 0.5),
    "all zeros": lambda path: replaced(path, bytes(path.stat().st_size)),
    "an LFS pointer": lambda path: replaced(path, POINTER),
    "a web page": lambda path: replaced(path, b"<!DOCTYPE html><html>Sign in</html>\n"),
    "a JSON object": lambda path: replaced(path, b'{"error": "not allowed"}'),
    "random bytes": lambda path: replaced(path, bytes(range(256)) * 4),
    "nothing but newlines": lambda path: replaced(path, b"\n\n\n"),
    "missing": missing,
    "renamed": renamed,
    "a folder": folder,
    "a link to nothing": dangling,
    "not readable": unreadable,
}


# --- what can happen to a column -----------------------------------------------------------------

UNUSED = {
    "are_different", "best_image_uid", "created_at", "image_0_url", "image_1_url", "ranking_id",
    "user_id", "num_example_per_prompt", "__index_level_0__",
}  # fmt: skip
"""Columns of Pick-a-Pic that nothing reads."""
TEXT = "another text"
WRONG: list[Any] = [["a"], {"a": 1}, 1.5, TEXT, 7, True]


def spoiled_parquet(path: Path) -> Iterator[tuple[str, pa.Table]]:
    table = pq.read_table(path)
    for name in [name for name in table.schema.names if name not in UNUSED]:
        at = table.schema.get_field_index(name)
        for wrong in WRONG:
            if name == "rank" and isinstance(wrong, (int, float)):
                continue  # other ranks are as good
            values = pa.array([wrong] * table.num_rows)
            yield f"{name} as {values.type}", table.set_column(at, name, values)
        lists = pa.array([[1, 2]] * table.num_rows, pa.list_(pa.uint8()))
        yield f"{name} as {lists.type}", table.set_column(at, name, lists)
        yield f"{name} null", table.set_column(at, name, pa.nulls(table.num_rows))
        yield f"{name} missing", table.drop_columns([name])
        yield f"{name} twice", table.append_column(name, table[name])


def spoiled_entries(entries: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """JSON objects of which one has a key of another type, or none, or is no object at all."""
    *_, last = [entry for entry in entries if isinstance(entry, dict)]
    at = len(entries) - 1 - list(entries)[::-1].index(last)
    for name in last:
        for wrong in [*WRONG, None]:
            yield f"{name} as {wrong}", [*entries[:at], last | {name: wrong}, *entries[at + 1 :]]
    yield "no objects", [1, 2, 3]
    yield "an entry that is a list", [*entries, [1]]


# --- how it may end ------------------------------------------------------------------------------


def check(what: str, read: Callable[[], Outcome], sound: Outcome, names: tuple[str, ...]) -> str:
    """How a case ended; fails where it ended wrongly."""
    try:
        rows = read()
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in names), f"{what}: names no file or setting: {text}"
        assert len(text) < 1500, f"{what}: {text}"
        return "refused"
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    for row in rows:
        kept = any(all(map(fits, row, good)) for good in sound)
        assert kept, f"{what}: read as {[str(value)[:40] for value in row]}"
    return "read"


def fits(value: Any, good: Any) -> bool:
    """Whether a value is that of a sound row, null, or what was put there, as a text."""
    return value is None or value in (good, TEXT, "7")


def tried(
    cases: Mapping[str, Callable[[Path], object]],
    path: Path,
    read: Callable[[], Outcome],
    names: tuple[str, ...],
    cut: Callable[[str], Outcome] = lambda what: [],
) -> str:
    """Spoil the file in every way, one after the other; `cut` are further rows that are right."""
    content, sound, ends = path.read_bytes(), read(), list[str]()
    for what, spoil in cases.items():
        if spoil is unreadable and os.geteuid() == 0:
            continue  # root reads everything
        spoil(path)
        ends.append(check(what, read, [*sound, *cut(what)], names))
        for place in (path, path.with_name(f"other-{path.name}")):
            if place.is_dir():
                place.rmdir()
            place.unlink(missing_ok=True)
        path.write_bytes(content)
    assert read() == sound
    refused = ends.count("refused")
    assert refused >= len(ends) // 2
    return f"{len(ends)} spoiled files tried, {refused} refused"


# --- pairs ---------------------------------------------------------------------------------------


def meaning(spec: PairsSpec) -> Outcome:
    """What labels depend on, of each row; nulls where there is nothing."""
    source = open_pairs(spec)
    rows = [
        row
        for shard in source.shards
        for batch in source.read(shard, batch_rows=3)
        for row in batch.to_pylist()
    ]
    return [(row["prompt"], row["image_0"], row["image_1"], row["human"]) for row in rows]


def set_of(kind: str, root: Path) -> tuple[PairsSpec, Path]:
    """A sound set and the file of its list."""
    root.mkdir()
    if kind == "miniature":
        spec = PairsSpec(kind=kind, root=str(root), options={"num_pairs": 6})
        open_pairs(spec)
        return spec, root / "train-00000-of-00004.parquet"
    if kind == "parquet inline":
        make_set("pickapic", root)
        shutil.rmtree(root / "deep")
        columns = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1"}
        columns |= {"human": "label_0", "known": "has_label"}
        spec = PairsSpec(kind="parquet", root=str(root), columns=columns, images=Images.inline)
        return spec, root / "train-0.parquet"
    spec = make_set(kind, root)
    shutil.rmtree(root / "deep", ignore_errors=True)
    ends = ("parquet", "json", "jsonl", "txt")
    files = (path for end in ends for path in sorted(root.glob(f"*.{end}")))
    return spec, next(files)


def pair_cases(path: Path) -> dict[str, Callable[[Path], object]]:
    cases: dict[str, Callable[[Path], object]] = dict(SPOILS)
    if path.suffix == ".parquet":
        for what, table in spoiled_parquet(path):
            cases[what] = lambda place, table=table: pq.write_table(table, place)
        return cases
    if path.suffix == ".txt":  # a prompt by itself
        for what, new in (("two", "a cat\0"), ("a list", "[1]"), ("latin-1", "caf\udce9")):
            content = new.encode("utf-8", "surrogateescape")
            cases[what] = lambda place, content=content: replaced(place, content)
        return cases
    lined, text = path.suffix == ".jsonl", path.read_text()
    entries = [json.loads(line) for line in text.split("\n")] if lined else json.loads(text)
    for what, values in spoiled_entries(entries):
        new = "\n".join(map(json.dumps, values)) if lined else json.dumps(values)
        cases[what] = lambda place, new=new: place.write_text(new)
    return cases


@pytest.mark.parametrize(
    "kind", [*sorted({*KINDS} - {"webdataset"}), "parquet inline", "miniature"]
)
def test_spoiled_pair_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec, path = set_of(kind, tmp_path / "set")
    cases = pair_cases(path)
    assert len(cases) >= (15 if path.suffix == ".txt" else 30)
    names = (path.name, "pairs.", str(tmp_path))
    sound = meaning(spec) if kind == "folders" else []

    def cut(what: str) -> Outcome:
        """Rows of a prompt that ends early, which no reader of text can notice."""
        ends = range(len("a cat on a mat")) if what in CUT else ()
        return [(row[0][:end].strip(), *row[1:]) for row in sound for end in ends]

    counts = tried(cases, path, lambda: meaning(spec), names, cut)
    with capsys.disabled():
        print(f"\npairs of {kind}: {counts}")


# --- prompts -------------------------------------------------------------------------------------

ROWS = [{"prompt": f"a cat, number {i}", "category": "x"} for i in range(6)]
PROMPTS = {
    "lines": ("p.txt", "\n".join(row["prompt"] for row in ROWS) + "\n"),
    "csv": ("p.csv", "prompt,category\n" + "".join(f'"{r["prompt"]}",x\n' for r in ROWS)),
    "tsv": ("p.tsv", "prompt\tcategory\n" + "".join(f"{r['prompt']}\tx\n" for r in ROWS)),
    "json": ("p.json", json.dumps(ROWS)),
    "jsonl": ("p.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    "hpd": ("p.json", json.dumps([row["prompt"] for row in ROWS])),
    "parti": ("p.tsv", "Prompt\tCategory\n" + "".join(f"{r['prompt']}\tx\n" for r in ROWS)),
    "parquet": ("p.parquet", ""),
}
CUT = {"truncated to a half", "without its last byte"}
"""What no reader of text can notice: a list of lines that ends early."""


def prompts_of(spec: PromptsSpec) -> Outcome:
    return [(prompt.text, prompt.category) for prompt in load_prompts(spec).prompts]


def prompt_cases(form: str, path: Path) -> dict[str, Callable[[Path], object]]:
    cases: dict[str, Callable[[Path], object]] = dict(SPOILS)
    for other, (name, new) in PROMPTS.items():
        if new and name != path.name:
            cases[f"content of {other}"] = lambda place, new=new: place.write_text(new)
    if form == "parquet":
        for what, table in spoiled_parquet(path):
            cases[what] = lambda place, table=table: pq.write_table(table, place)
    if form in ("json", "jsonl"):
        for what, values in spoiled_entries(ROWS):
            new = "\n".join(map(json.dumps, values)) if form == "jsonl" else json.dumps(values)
            cases[what] = lambda place, new=new: place.write_text(new)
    return cases


@pytest.mark.parametrize("form", PROMPTS)
def test_spoiled_prompt_files(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name, text = PROMPTS[form]
    path = tmp_path / name
    kind = PromptsKind(form) if form in ("lines", "hpd", "parti") else PromptsKind.table
    spec = PromptsSpec(name="set", kind=kind, path=str(path))
    if text:
        path.write_text(text)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    sound = prompts_of(spec)
    assert len(sound) == len(ROWS)

    def cut(what: str) -> Outcome:
        if what not in CUT or form not in ("lines", "tsv", "parti"):
            return []
        return [(text[:end], category) for text, category in sound for end in range(len(text))]

    names = (name, "evaluate.prompts")
    counts = tried(prompt_cases(form, path), path, lambda: prompts_of(spec), names, cut)
    with capsys.disabled():
        print(f"\nprompts as {form}: {counts}")
