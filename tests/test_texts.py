"""Prompts encoded once, in stage one, are what the trainer would have encoded in every step."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from data.artifacts.atomic import ShardError
from data.artifacts.manifest import verify
from data.artifacts.parquet_io import read_table, write_table
from data.artifacts.schemas import PAIR_FACTS
from data.artifacts.texts import TextFormat, TextSet, read_set
from data.distributed import Rank
from data.families.text import find_text
from data.models.text_encoders import encode_distinct
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from label.scoring import text_files
from label.scoring.score_sets import FACTS, ScoreSets
from label.scoring.text_files import TextFiles
from label.scoring.text_writer import PromptEncoder, write_texts
from tests.helpers_flow import WRITERS
from tests.helpers_train import SIDE, write_base, write_labels, write_pairs, write_sdxl_base
from train.config import ModelSpec, Precision
from train.loader.text_source import CachedTexts, open_texts
from train.models.components import ModelComponents, load_components

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BASES = {"sd": write_base, "sdxl": write_sdxl_base} | WRITERS
PROMPTS = ("", "a red cat", "a green cat", "a blue cat", "a grey cat")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pairs, and the facts that the scoring pass learns of them."""
    root = tmp_path_factory.mktemp("texts")
    for name, write in BASES.items():
        write(root / name)
    write_pairs(root / "pairs")
    write_labels(root / "labels", root / "pairs")
    sets = sets_of(root)
    for shard in sets.shards:
        labels = read_table(root / "labels" / f"part-{shard.index:05d}.parquet")
        rows = labels.select(PAIR_FACTS.names).to_pylist()
        if shard.index == 0:
            rows[2] |= {"prompt": "", "status": "empty_prompt"}
            rows[3] |= {"prompt": "a torn image", "status": "unreadable_image"}
        import pyarrow as pa

        write_table(sets.path(FACTS, shard), pa.Table.from_pylist(rows, PAIR_FACTS))
    return root


def sets_of(root: Path) -> ScoreSets:
    return ScoreSets(root / "scores", open_pairs(PairsSpec(root=str(root / "pairs"))).shards, {})


def files_of(root: Path, name: str, folder: Path, **change: str) -> TextFiles:
    text = find_text(root / name)
    given = {"dtype": "fp32", "compute": "fp32"} | change
    form = TextFormat(family=text.family.name, encoders=text.sha256, **given)
    return TextFiles(folder / form.name, form, sets_of(root), root / name, text)


def write(files: TextFiles, rank: Rank = Rank()) -> TextSet:
    encoder = PromptEncoder(files, 8)
    encoder.check()
    write_texts(files, encoder, rank, CPU, Console(quiet=True))
    files.declare_complete({}, since=0.0)
    texts = read_set(files.folder)
    assert texts is not None
    return texts


def load(root: Path, name: str, texts: Any = None, precision: Precision = Precision.fp32) -> ModelComponents:
    spec = ModelSpec(path=str(root / name), resolution=SIDE)
    return load_components(spec, precision, CPU, with_vae=False, texts=texts)


@pytest.mark.parametrize("name", BASES)
def test_texts_are_what_the_encoders_say(root: Path, tmp_path: Path, name: str):
    texts = write(files_of(root, name, tmp_path))
    verify(texts.folder, texts.manifest)
    cached = open_texts(texts, PROMPTS, [])
    assert tuple(cached.rows) == PROMPTS
    components = load(root, name)
    wanted = [PROMPTS[at] for at in (3, 0, 1, 3, 4)]
    ours, theirs = encode_distinct(cached, wanted), encode_distinct(components.text, wanted)
    assert torch.equal(ours.states, theirs.states)
    print(texts)
