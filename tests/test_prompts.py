import json
from hashlib import sha256

import huggingface_hub
import polars as pl
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from data.miniature.pairs import write_pairs
from data.pairs.config import PairsSpec
from generate.config import PromptsKind, PromptsSpec
from generate.prompts.prompt_set import load_prompts
from generate.prompts.text_files import PromptsError


def spec(path, kind=PromptsKind.lines, **more):
    return PromptsSpec(name="set", kind=kind, path=str(path), **more)


def texts(prompts):
    return [prompt.text for prompt in prompts.prompts]


def test_empty_and_repeated_lines_are_left_out_and_counted(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cat\r\n\u201ca\u2028house\u201d\n")
    prompts = load_prompts(spec(path))
    assert texts(prompts) == ["a cat", "a dog", "\u201ca\u2028house\u201d"]
    assert [prompt.id for prompt in prompts.prompts] == [0, 2, 4]
    assert prompts.counts == "prompts 3 · empty 1 · repeated 1 · total 5"


def test_max_prompts_takes_the_first_distinct_ones(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\na\nb\nc\n")
    assert texts(load_prompts(spec(path, max_prompts=2))) == ["a", "b"]


def test_half_a_character_is_refused_with_its_row(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["a cat", "cut \\ud83d"]')
    with pytest.raises(PromptsError, match=r"json, row 1: 'cut \\ud83d' has half of a character"):
        load_prompts(spec(path, PromptsKind.table))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_set_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(PromptsError, match="has no prompt"):
        load_prompts(spec(path))


def test_partiprompts_are_tab_separated_and_quotes_are_ordinary(tmp_path):
    rows = [("Prompt", "Category", "Challenge", "Note")]
    rows += [(f'a "sign {i}', "Arts", "Writing & Symbols", "") for i in range(1632)]
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    prompts = load_prompts(spec(path, PromptsKind.parti)).prompts
    assert len(prompts) == 1632  # with quoting on, the open quotes would swallow rows
    assert prompts[7].text == 'a "sign 7'
    assert (prompts[7].category, prompts[7].challenge) == ("Arts", "Writing & Symbols")


def test_another_tsv_is_refused_with_its_columns(tmp_path):
    path = tmp_path / "other.tsv"
    path.write_text("text\tstyle\na\tb\n")
    with pytest.raises(PromptsError, match=r"has the columns text, style but not Prompt"):
        load_prompts(spec(path, PromptsKind.parti))


def test_hpd_folder_keeps_styles_and_numbers_prompts_across_files(tmp_path):
    (tmp_path / "anime.json").write_text(json.dumps(["a", "b"]))
    (tmp_path / "photo.json").write_text(json.dumps(["c"]))
    prompts = load_prompts(spec(tmp_path, PromptsKind.hpd)).prompts
    assert [(p.id, p.text, p.category) for p in prompts] == [
        (0, "a", "anime"), (1, "b", "anime"), (2, "c", "photo"),
    ]  # fmt: skip
    assert texts(load_prompts(spec(tmp_path / "photo.json", PromptsKind.hpd))) == ["c"]


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "[", '[{"prompt": "a"}]'])
def test_hpd_file_of_another_layout_is_refused(tmp_path, content):
    path = tmp_path / "anime.json"
    path.write_text(content)
    with pytest.raises(PromptsError, match="anime.json"):
        load_prompts(spec(path, PromptsKind.hpd))


@pytest.mark.parametrize("column", ["prompt", "caption"])
@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_tables_are_read_by_their_usual_columns(tmp_path, column, suffix):
    rows = [{column: "a", "category": "x", "n": 1}, {column: None, "category": "x", "n": 2}]
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(spec(path, PromptsKind.table))
    assert texts(prompts) == ["a"]
    assert prompts.prompts[0].category == "x"
    assert prompts.empty == 1


def test_a_table_without_prompts_names_its_columns_and_the_setting(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(PromptsError, match=r"has the columns text .*evaluate\.prompts\.column"):
        load_prompts(spec(path, PromptsKind.table))
    assert texts(load_prompts(spec(path, PromptsKind.table, column="text"))) == ["a"]


@pytest.mark.parametrize(
    "kind", [k for k in PromptsKind if k not in (PromptsKind.miniature, PromptsKind.pairs)]
)
def test_a_missing_file_names_the_setting(tmp_path, kind):
    with pytest.raises(PromptsError, match=r"evaluate\.prompts\.path=.*nowhere is no file"):
        load_prompts(spec(tmp_path / "nowhere", kind))


def test_miniature_prompts_are_those_of_the_held_out_split():
    from data.miniature import scenes

    prompts = load_prompts(spec("", PromptsKind.miniature, split="test", max_prompts=40))
    assert texts(prompts) == list(scenes.prompts("test"))[:40]
    assert not set(texts(prompts)) & set(scenes.prompts("train"))
    with pytest.raises(PromptsError, match="test and validation"):
        load_prompts(spec("", PromptsKind.miniature, split="train"))


def test_sha256_is_that_of_ids_and_texts_in_order(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\n")
    one = load_prompts(spec(path)).sha256
    assert one == sha256(b'[[0, "a"], [1, "b"]]').hexdigest()
    path.write_text("b\na\n")
    assert load_prompts(spec(path)).sha256 != one


@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet", "json"])
def test_categories_and_challenges_of_any_table_are_kept(tmp_path, suffix):
    rows = [{"Caption": 'a "big, red" cat', "Category": "x", "Challenge": "y", "n": "1"},
            {"Caption": "a dog", "Category": "", "Challenge": "z", "n": "2"}]  # fmt: skip
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif suffix == "csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\r\n".join(lines) + "\r\n")
    prompts = load_prompts(spec(path, PromptsKind.table)).prompts
    assert [(p.text, p.category, p.challenge) for p in prompts] == [
        ('a "big, red" cat', "x", "y"), ("a dog", None, "z"),
    ]  # fmt: skip


def test_a_quoted_csv_cell_may_span_lines(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,category\n"a cat\non a mat",x\na dog,x\n')
    assert texts(load_prompts(spec(path, PromptsKind.table))) == ["a cat\non a mat", "a dog"]


def test_a_json_list_of_texts_is_a_table_of_one_column(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('["a cat", " ", "a dog"]')
    prompts = load_prompts(spec(path, PromptsKind.table))
    assert texts(prompts) == ["a cat", "a dog"]
    assert prompts.empty == 1


def test_an_unknown_table_says_what_can_be_read(tmp_path):
    path = tmp_path / "prompts.xlsx"
    path.write_text("x")
    with pytest.raises(PromptsError, match=r"ends in \.xlsx; tables are \.parquet.*prompts=lines"):
        load_prompts(spec(path, PromptsKind.table))


def test_a_folder_of_parquet_files_gives_the_named_split(tmp_path):
    for split, seed in (("validation_unique", 1), ("train", 2)):
        write_pairs(tmp_path, 30, seed, 1, "validation" if seed == 1 else "train")
        file = tmp_path / f"{'validation' if seed == 1 else 'train'}-00000-of-00001.parquet"
        file.rename(tmp_path / f"{split}-00000-of-00001.parquet")
    wanted = spec(tmp_path, PromptsKind.table, split="validation_unique", column="caption")
    captions = pl.read_parquet(tmp_path / "validation_unique-*.parquet")["caption"].to_list()
    prompts = load_prompts(wanted)
    assert texts(prompts) == [text for text in dict.fromkeys(captions) if text]
    assert len(prompts.prompts) + prompts.empty + prompts.repeated == 30
    with pytest.raises(PromptsError, match=r"has no test\*\.parquet; name the split"):
        load_prompts(spec(tmp_path, PromptsKind.table, split="test"))


def test_held_out_prompts_occur_in_no_training_pair(tmp_path):
    write_pairs(tmp_path, 60, 1, 2, "train")
    write_pairs(tmp_path, 40, 2, 1, "validation")
    pairs = PairsSpec(root=str(tmp_path), split="train", max_pairs=1)
    own = pl.read_parquet(tmp_path / "validation-*.parquet")
    shared = [text for text in own["caption"].unique(maintain_order=True) if text][:2]
    first = tmp_path / "train-00000-of-00002.parquet"  # the only file that max_pairs=1 takes
    other = tmp_path / "train-00001-of-00002.parquet"
    for file, text in ((first, f"  {shared[0].upper()} "), (other, shared[1])):
        frame = pl.read_parquet(file)
        frame[0, "caption"] = text
        frame.write_parquet(file)
    wanted = spec("", PromptsKind.pairs, split="validation", exclude_trained=True)
    held_out = load_prompts(wanted, pairs)
    assert shared[0] not in texts(held_out)  # case and whitespace do not hide it
    assert shared[1] in texts(held_out)  # not trained on: max_pairs leaves its file out
    assert held_out.trained == own.filter(pl.col("caption") == shared[0]).height
    assert held_out.counts.endswith(f"in training pairs {held_out.trained} · total 40")
    everything = load_prompts(spec("", PromptsKind.pairs, split="validation"), pairs)
    assert shared[0] in texts(everything)
    with pytest.raises(PromptsError, match=r"no prompt left \(prompts 0 .* in training pairs \d+"):
        load_prompts(
            spec("", PromptsKind.pairs, split="train", exclude_trained=True),
            PairsSpec(root=str(tmp_path), split="train"),
        )


def test_prompts_of_any_file_can_be_compared_with_the_training_pairs(tmp_path):
    write_pairs(tmp_path, 30, 1, 1, "train")
    used = pl.read_parquet(tmp_path / "train-*.parquet")["caption"].to_list()[0]
    path = tmp_path / "prompts.txt"
    path.write_text(f"{used}\nnever seen\n")
    pairs = PairsSpec(root=str(tmp_path), split="train")
    assert texts(load_prompts(spec(path, exclude_trained=True), pairs)) == ["never seen"]


def test_a_hub_data_set_is_read_at_its_commit_from_the_cache_first(tmp_path, monkeypatch):
    commit, calls = "0123456789" * 4, []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p.jsonl").write_text('{"prompt": "a cat"}\n')

    def snapshot_download(name, *, repo_type, revision, allow_patterns, local_files_only=False):
        calls.append((name, repo_type, revision, allow_patterns[0], local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("data.storage.hub.unreachable", lambda: "")
    wanted = spec("owner/set/data/p.jsonl", PromptsKind.table, revision=commit)
    assert texts(load_prompts(wanted)) == ["a cat"]
    expected = ("owner/set", "dataset", commit, "data/p.jsonl")
    assert calls == [(*expected, True), (*expected, False)]


@pytest.mark.parametrize(
    ("revision", "says"),
    [(None, r"is no file .*its 40-digit commit in evaluate\.prompts\.revision"),
     ("main", r"revision 'main'; give the 40-digit commit")],
)  # fmt: skip
def test_a_hub_data_set_needs_a_commit(revision, says):
    with pytest.raises(PromptsError, match=says):
        load_prompts(spec("owner/set/p.json", PromptsKind.table, revision=revision))
