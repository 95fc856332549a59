"""Held-out pairs: never trained on, the same at every look, compared with the base."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.artifacts.atomic import ShardError
from tests import rank_programs
from tests.helpers_ranks import Place, run_ranks, shared_place, straight
from train.config import ValidationSpec
from train.dpo.draws import keyed_uniform
from train.loader.dataset import DecidedPairs
from train.trainer.validation import FIELDS, deal_with_filler, split

SHARE = 0.6
"""Holds out one of the four prompts of the shared place's pairs (by their hashes)."""


def pairs_of(prompts: list[str]) -> DecidedPairs:
    count = len(prompts)
    table = pa.table({"prompt": prompts, "pair_id": [f"p{i}" for i in range(count)]})
    return DecidedPairs(table, "x", np.arange(count) // 8, np.arange(count) % 8, ())


@given(
    st.lists(st.sampled_from([f"prompt {i}" for i in range(30)]), min_size=60, max_size=200),
    st.sampled_from([0.1, 0.3, 0.6]),
    st.integers(1, 50),
)
def test_no_prompt_is_on_both_sides(prompts: list[str], share: float, most: int):
    pairs = pairs_of(prompts)
    spec = ValidationSpec(share=share, pairs=most)
    chosen = {prompt for prompt in prompts if keyed_uniform(f"held out/{prompt}") < share}
    if len(chosen) in (0, len(set(prompts))):
        with pytest.raises(ShardError, match=f"share={share} holds out"):
            split(pairs, spec)
        return
    trained = split(pairs, spec)
    held_out = trained.held_out
    assert held_out is not None
    assert set(held_out.table["prompt"].to_pylist()) <= chosen
    assert trained.table["prompt"].to_pylist() == [p for p in prompts if p not in chosen]
    assert len(held_out) == min(most, len(pairs) - len(trained))
    assert (np.diff(held_out.group) >= 0).all()
    names = pairs.table["pair_id"].to_pylist()
    for some in (trained, held_out):
        where = [names.index(name) for name in some.table["pair_id"].to_pylist()]
        assert (pairs.group[where] == some.group).all()
        assert (pairs.row[where] == some.row).all()


def test_what_is_held_out_depends_on_the_prompt_alone():
    prompts = [f"prompt {i % 40}" for i in range(100)]
    one = split(pairs_of(prompts), ValidationSpec(share=0.3)).held_out
    two = split(pairs_of([*prompts[::-1], "another"]), ValidationSpec(share=0.3)).held_out
    assert one is not None
    assert two is not None
    prompts = [set(some.table["prompt"].to_pylist()) - {"another"} for some in (one, two)]
    assert prompts[0] == prompts[1]
    assert 3 < len(prompts[0]) < 25


def test_without_a_share_all_are_trained_on():
    pairs = pairs_of(["a", "b"])
    assert split(pairs, ValidationSpec()) is pairs


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_every_rank_has_as_many_batches_and_each_pair_counts_once(
    count: int, micro_batch: int, world: int
):
    each = [list(deal_with_filler(count, micro_batch, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in each}) == 1
    counted = []
    for batches in each:
        for indices, real in batches:
            assert len(indices) == micro_batch
            assert ((indices >= 0) & (indices < count)).all()
            counted += indices[:real].tolist()
    assert sorted(counted) == list(range(count))


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_before_training_the_policy_is_the_base(tmp_path: Path, stage: int):
    place = shared_place()
    labels = place.folder(straight(2, 1)).parent / "labels" / "majority"
    run_ranks(tmp_path, 2, rank_programs.looks_at_held_out, place.root, labels, stage, SHARE)


def validated(place: Place, name: str, world: int, *more: str) -> list[dict]:
    share = f"train.validation.share={SHARE}"
    place.train(name, "zero=stage2", share, "train.validation.pairs=5", *more, world=world)
    return place.journal(name)


@pytest.mark.ranks
def test_looks_are_in_the_journal_and_change_no_weight():
    place = shared_place()
    often = validated(place, "often", 1, "train.validation.every=2")
    seldom = validated(place, "seldom", 1, "train.validation.every=100")
    assert place.weights("often") == place.weights("seldom")
    assert place.weights("often") != place.weights(straight(2, 1))  # fewer pairs were trained on
    looked = [line["step"] for line in often if line["validation_accuracy"] is not None]
    assert looked == [2, 4, 6]
    assert [line["step"] for line in seldom if line["validation_accuracy"] is not None] == [6]
    for field in FIELDS:
        assert often[-1][field] == seldom[-1][field]
        assert field not in place.journal(straight(2, 1))[0]
    assert 0 <= often[-1]["validation_accuracy"] <= 1
    assert often[-1]["validation_winner_error"] != often[1]["validation_winner_error"]
    both = validated(place, "both", 2, "train.validation.every=2")
    for one, two in zip(often, both, strict=True):
        for field in FIELDS[2:4]:
            assert two[field] == (one[field] and pytest.approx(one[field], rel=1e-3))
    card = (place.folder("often") / "pipeline" / "README.md").read_text()
    assert "held-out pairs" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [({"share": 1.0}, "share=1.0"), ({"pairs": 0}, "pairs=0"), ({"every": 0}, "every=0")],
)
def test_settings_are_checked(change: dict[str, float], message: str):
    with pytest.raises(ValueError, match=f"train.validation.{message}"):
        ValidationSpec(**change)  # type: ignore[arg-type]
