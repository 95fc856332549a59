"""The reference follows the policy as its rule says, at every ZeRO stage, part by part."""

from pathlib import Path

import pytest
import torch

from tests import rank_programs
from tests.helpers_ranks import run_ranks, shared_place
from train.dpo.reference import move
from train.trainer.checkpoint import shard_bounds


def test_a_snapshot_is_a_copy_and_an_average_moves_by_alpha():
    target, source = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])
    move(target, source, 0.25)
    assert target.tolist() == [0.25, 2.5]
    move(target, source, 1.0)
    assert torch.equal(target, source)


@pytest.mark.parametrize("numel", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_are_a_partition(numel: int, world: int):
    bounds = [shard_bounds(numel, rank, world) for rank in range(world)]
    covered = [i for first, length in bounds for i in range(first, first + length)]
    assert covered == list(range(numel))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "precision", "refresh"),
    [
        (0, "fp32", "snapshot"),
        (1, "bf16", "snapshot"),
        (2, "fp32", "snapshot"),
        (2, "bf16", "ema"),
        (2, "fp32", "frozen"),
        (3, "fp32", "snapshot"),
        (3, "bf16", "ema"),
    ],
)
def test_two_ranks_refresh_part_by_part(tmp_path: Path, stage: int, precision: str, refresh: str):
    base = shared_place().root / "base"
    run_ranks(tmp_path, 2, rank_programs.refreshes, base, stage, precision, refresh)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "precision", "refresh"),
    [
        (1, "bf16", "snapshot"),
        (2, "bf16", "ema"),
        (3, "bf16", "snapshot"),
        (3, "fp32", "frozen"),
    ],
)
def test_two_ranks_refresh_an_adapter(tmp_path: Path, stage: int, precision: str, refresh: str):
    base = shared_place().root / "base"
    run_ranks(tmp_path, 2, rank_programs.refreshes, base, stage, precision, refresh, 4)


@pytest.mark.ranks
def test_two_ranks_average_the_policy_part_by_part(tmp_path: Path):
    run_ranks(tmp_path, 2, rank_programs.averages, shared_place().root / "base", tmp_path)


@pytest.mark.ranks
def test_small_moves_of_a_bf16_average_are_not_rounded_away(tmp_path: Path):
    run_ranks(tmp_path, 1, rank_programs.small_moves, shared_place().root / "base")


@pytest.mark.ranks
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_whole_step_is_the_formula(tmp_path: Path, prediction: str):
    run_ranks(tmp_path, 1, rank_programs.step_is_the_formula, tmp_path / "base", prediction)
