"""Encoded prompts of the tiny pairs, written as stage one writes them."""

from functools import partial
from pathlib import Path

import torch

from data.artifacts.texts import TextFormat, TextSet, read_set
from data.distributed import Rank
from data.families.text import find_text
from data.pairs import open_pairs
from data.pairs.config import PairsSpec
from label.scoring.score_sets import ScoreSets
from label.scoring.text_files import TextFiles, scored_prompts
from label.scoring.text_writer import PromptEncoder
from label.scoring.text_writer import write_texts as write_files

CPU = torch.device("cpu")


def text_files(root: Path, model: Path, folder: Path, **change: str) -> TextFiles:
    """Of the pairs in `root`, whose facts are in `root/scores`; fp32 unless changed."""
    text = find_text(model)
    given = {"dtype": "fp32", "compute": "fp32"} | change
    form = TextFormat(family=text.family.name, encoders=text.sha256, **given)
    gather = partial(scored_prompts, sets_of(root))
    return TextFiles(folder / form.name, form, model, text, 36, gather)


def sets_of(root: Path) -> ScoreSets:
    """What the scoring pass has learned of the pairs in `root`."""
    shards = open_pairs(PairsSpec(root=str(root / "pairs"))).shards
    return ScoreSets(root / "scores", shards, {})


def write_texts(files: TextFiles) -> TextSet:
    """A whole set."""
    write_as(files, Rank())
    files.declare_complete({}, since=0.0)
    texts = read_set(files.folder)
    assert texts is not None
    return texts


def write_as(files: TextFiles, rank: Rank) -> None:
    """What a rank does before the manifest is written."""
    encoder = PromptEncoder(files, 8)
    encoder.check()
    write_files(files, encoder, rank, CPU, None)
