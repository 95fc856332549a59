"""Settings mean what was typed, and a message shows what to type."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conf.command_line import as_text, for_make, is_text, quoted, spelling
from conf.job import Job, composed
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from data.storage import open_store
from data.storage.base import StoreError
from data.storage.paths import user_path
from evaluate.run import models_of
from generate.config import PromptsKind, PromptsSpec
from generate.prompts.prompt_set import load_prompts
from label.metrics.weights import locate
from tests.helpers_docs import dry_run
from tests.helpers_pairs import make_set
from train.identity import fingerprint
from train.models.base_model import find_model

ROOT = Path(__file__).parent.parent
ODD = [
    "/data/split=train", "/data/a (copy)", "/data/a(1", "/data/a#b", "/data/a,b", "~/pairs",
    "/données/ü", "2024_01", "007", "1e3", "it's", 'a"b', "both'\"", "back\\", "[x]", "{x}", "a:b",
    "-x", "$HOME/x", "a;b", "a&b", "100%",
]  # fmt: skip


@pytest.mark.parametrize("value", ODD)
def test_a_text_is_taken_as_it_is_typed(value: str):
    job = composed([f"pairs.root={value}", f"++evaluate.models.ours={value}"])
    assert job.pairs.root == value
    assert job.evaluate.models == {"ours": value}


def test_other_settings_keep_hydras_grammar():
    arguments = ["vote=human", "train.lr=1e-6", "panel.voters=[clip, hps]", "pairs.root='/a=b'",
                 "evaluate.prompts.revision=null", "pairs.root=", "--cfg", "train.x=a"]  # fmt: skip
    assert as_text(arguments, Job) == arguments
    assert composed(["run=2024_11_25"]).run == "2024_11_25"  # no number with separators


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.root", True), ("run", True), ("+pairs.columns.prompt", True),
        ("metrics.clip.weights", True), ("model.revision", True), ("++evaluate.models.a", True),
        ("pairs", False), ("pairs.options.x", False), ("train.lr", False), ("vote.rule", False),
        ("nothing.like.it", False), ("run.more", False), ("metric@metrics.mine", False),
    ],
)  # fmt: skip
def test_which_settings_are_texts(name: str, text: bool):
    assert is_text(name, Job) is text


def test_what_is_shown_can_be_typed(monkeypatch: pytest.MonkeyPatch):
    shown = spelling("+pairs.options.suffix=a=(b")
    python, make = shown.removeprefix("if its value is a text, type ").split(" for python, ")
    assert shlex.split(python) == ['+pairs.options.suffix="a=(b"']
    assert composed(shlex.split(python)).pairs.options["suffix"] == "a=(b"
    assert make == f"ARGS={for_make('+pairs.options.suffix=' + quoted('a=(b'))} for make"
    monkeypatch.setattr(sys, "argv", ["label", "pairs.root=/my", "data"])
    assert "belongs to pairs.root=/my, type 'pairs.root=/my data' for python" in spelling("data")


@pytest.mark.parametrize("value", [value for value in ODD if value != "back\\"])
def test_make_hands_on_what_is_shown(value: str):
    """Through the reader's shell, make and make's shell."""
    argument = f"pairs.root={value}"
    typed = f"make -n -s labels NPROC=1 PY=echo ARGS={for_make(argument)}"
    done = subprocess.run(
        ["bash", "-c", typed], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    recipe = done.stdout.strip().splitlines()[-1]
    assert shlex.split(recipe)[-1] == argument


def test_make_says_what_a_shell_would_trip_over():
    done = dry_run("labels", "NPROC=1", "ARGS=pairs.root=/data/a(1)")
    assert done.returncode != 0
    assert "ARGS has ( ) outside quotes" in done.stdout + done.stderr
    assert dry_run("labels", "NPROC=1", "ARGS='pairs.root=/data/a(1)'").returncode == 0


# --- home ----------------------------------------------------------------------------------------


def test_home_is_meant_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    make_set("pickapic", tmp_path / "set")
    assert open_pairs(PairsSpec(root="~/set")).root == str(tmp_path / "set")
    assert open_store("pairs.image_root", "~/set").url == str(tmp_path / "set")
    (tmp_path / "m").symlink_to(ROOT / "data/miniature/weights/base")
    (tmp_path / "p.txt").write_text("a cat\n")
    prompts = PromptsSpec(name="x", kind=PromptsKind.lines, path="~/p.txt")
    assert load_prompts(prompts).prompts[0].text == "a cat"
    assert locate("metrics.x.weights", "~/m", None) == tmp_path / "m"
    job = composed(["runs=~/runs", "run=r", "model.path=~/m", "++evaluate.models.base=~/m"])
    assert job.folder == tmp_path / "runs" / "r"
    assert find_model(job.model) == tmp_path / "m"
    assert fingerprint(job.model)
    (model,) = models_of(job)
    assert (model.path, model.is_local) == (str(tmp_path / "m"), True)


@pytest.mark.parametrize("path", ["a" * 256, "/".join(["ab"] * 2000)], ids=["name", "path"])
def test_a_path_that_no_system_takes_is_named(path: str):
    with pytest.raises(ValueError, match=r"pairs\.root=ab?.*\.\.\. is longer than a path can be"):
        open_pairs(PairsSpec(kind="pickapic", root=path))
    with pytest.raises(ValueError, match=r"model\.path=.* is longer than a path can be"):
        find_model(composed([f"model.path={path}"]).model)
    with pytest.raises(ValueError, match=r"metrics\.x\.weights=.* is longer than a path can be"):
        locate("metrics.x.weights", path, None)


def test_a_missing_folder_at_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    job = composed(["pairs=pickapic", "pairs.root=~/nope"])
    with pytest.raises(StoreError, match=r"pairs\.root=~/nope is not a folder"):
        open_pairs(job.pairs)
    with pytest.raises(ValueError, match=r"pairs\.root=~nobody-here/x: ~nobody-here is no user's"):
        user_path("~nobody-here/x", "pairs.root")
    assert user_path("./~x", "pairs.root") == Path("~x")
    assert os.environ["HOME"] == str(tmp_path)
