"""Prompt files that could be read in two ways are refused, with the row and the way out."""

import pytest

from generate.config import PromptsKind
from generate.prompts.prompt_set import load_prompts
from generate.prompts.text_files import PromptsError
from tests.test_prompts import spec, texts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prompt,category\na cat,x\na red,blue dog,x\n",
         r"row 1 has 3 cells \('a red', \.\.\.\), but the header has 2 .* put the text into"),
        ("prompt,category\na cat,x\na red cat, sitting on a mat\n",
         r"row 1 has a space after a comma outside quotes .*put the text into quotes"),
        ("prompt,category\na cat,x\na dog\n", "row 1 has 1 cells .*but the header has 2"),
        ('prompt,category\na cat,x\n"a dog,x\na bird,x\n',
         r"row 1 \(line 3\) cannot be read: its quote is never closed; put the text"),
        ('prompt\na cat\n"a dog\na bird\n', r"row 1 \(line 3\) .*never closed"),
        ('prompt,category\n"a dog,x\n"a bird",x\n', r"row 0 \(line 2\) .*a quote inside a text"),
        (f"prompt,category\na cat,x\n{'x' * 140_000},x\n", r"row 1 \(line 3\).*more than 131072"),
        ("prompt,Prompt\na,b\n", "has several columns 'prompt'"),
        ("prompt, category\na cat, x\n", "the header has a space after a comma"),
    ],
)  # fmt: skip
def test_a_csv_that_could_be_read_otherwise_is_refused(tmp_path, content, says):
    path = tmp_path / "prompts.csv"
    path.write_text(content)
    with pytest.raises(PromptsError, match=says):
        load_prompts(spec(path, PromptsKind.table))


def test_a_csv_of_one_column_is_read_line_by_line(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\r\na red cat, sitting on a mat\r\na dog\r\n" + "x" * 140_000)
    expected = ["a red cat, sitting on a mat", "a dog", "x" * 140_000]
    assert texts(load_prompts(spec(path, PromptsKind.table))) == expected


def test_a_tsv_with_more_cells_than_names_is_refused(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text("prompt\tcategory\na\tb\nc\td\te\n")
    with pytest.raises(PromptsError, match="row 1 has 3 cells"):
        load_prompts(spec(path, PromptsKind.table))


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", "prompt\na\n"), ("p.txt", '["a", "b"]'), ("p.txt", '{"prompt": "a"}\n'),
     ("p.txt", '[\n"a"\n]')],
)  # fmt: skip
def test_a_table_is_no_list_of_lines(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PromptsError, match=r"is a table or JSON.* prompts=table"):
        load_prompts(spec(path))


def test_brackets_in_a_prompt_are_no_json(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("[photo] of a cat\n{red} dog\n")
    assert len(load_prompts(spec(path)).prompts) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
        (bytes(100), "line 1 has a NUL byte"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"caf\xe9\n", "cannot be read as UTF-8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.json", "p.jsonl"])
def test_files_that_are_no_prompts_are_refused(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    kind = PromptsKind.lines if name == "p.txt" else PromptsKind.table
    with pytest.raises(PromptsError, match=says):
        load_prompts(spec(path, kind))
