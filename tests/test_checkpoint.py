"""A resumed run ends with the same bits; a damaged checkpoint is named and never used."""

import contextlib
import json
import pickle
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers_ranks import Place, shared_place, straight
from train.distributed.world import World
from train.trainer.checkpoint import describe_own_files, read_shard, reference_file, shard_bounds

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
TIMES = ("pairs_per_s", "data_wait_s")


def same_journals(place: Place, one: str, two: str) -> None:
    """Equal but for the clock: every step once, in order, with the same numbers."""
    first, second = (
        [{key: line[key] for key in line if key not in TIMES} for line in place.journal(name)]
        for name in (one, two)
    )
    assert first == second


FOLLOWERS = ("train.beta=auto", "train.auto_beta.window=2", "train.ema=0.9")
"""What follows the policy and has to be resumed with it."""


def copy_run(place: Place, name: str, to: str, *without: str) -> Path:
    """A run as it would be if it had been stopped before `without` was written."""
    target = place.root / "runs" / to
    shutil.copytree(place.root / "runs" / name, target)
    for part in ("pipeline", *without):
        shutil.rmtree(target / "train" / part)
    return target / "train"


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 1), (2, 2), (3, 2)])
def test_resuming_ends_with_the_same_bits(stage: int, world: int):
    """From the checkpoint after step 4: other optimizer moments, reference and position."""
    place, name = shared_place(), straight(stage, world)
    again = f"again-{stage}-{world}"
    folder = copy_run(place, name, again, "step-0000006")
    output = place.train(again, f"zero=stage{stage}", world=world)
    assert f"resuming after step 4 from {folder}/step-0000004" in output
    assert place.weights(again) == place.weights(name)
    same_journals(place, name, again)


@pytest.mark.parametrize(
    ("stage", "before", "now", "more"),
    [(0, 1, 2, ()), (1, 2, 1, FOLLOWERS), (2, 2, 1, ()), (3, 1, 2, ())],
)
def test_resuming_with_another_number_of_ranks(
    stage: int, before: int, now: int, more: tuple[str, ...]
):
    """The same pairs and noise; only the order of sums may differ."""
    place, name = shared_place(), straight(stage, before, *more)
    again = f"moved-{stage}"
    copy_run(place, name, again, "step-0000006")
    output = place.train(again, f"zero=stage{stage}", *more, world=now)
    assert f"written by {before} processes, now {now}" in output
    for one, two in zip(place.journal(name), place.journal(again), strict=True):
        for key in ("loss", "policy_winner_error", "reference_loser_error", "beta"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)
    if more:
        one, two = (load_file(place.result(run, "pipeline_ema")) for run in (name, again))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
    betas = {line["beta"] for line in place.journal(again)}
    assert len(betas) == (5 if more else 1)  # of 6 steps the first 2 are warm-up
    assert not (place.folder(again) / ".universal").exists()


@pytest.mark.parametrize("more", [("train.precision=bf16", "reference=ema", *FOLLOWERS)])
def test_a_bf16_average_resumes_with_the_same_bits(more: tuple[str, ...]):
    place, name = shared_place(), straight(2, 1, *more)
    copy_run(place, name, "again-ema", "step-0000006")
    place.train("again-ema", "zero=stage2", *more)
    assert place.weights("again-ema") == place.weights(name)
    assert place.weights("again-ema", "pipeline_ema") == place.weights(name, "pipeline_ema")
    assert place.weights(name, "pipeline_ema") != place.weights(name)
    same_journals(place, name, "again-ema")
    shards = load_file(place.folder(name) / "step-0000006" / "reference-00000-of-00001.safetensors")
    assert {str(shard.dtype) for shard in shards.values()} == {"torch.float32"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


class Poison:
    """Unpickled, it runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (open, (str(self.mark), "w"))


def poison(path: Path, mark: Path) -> None:
    """A shard that, when it is opened as DeepSpeed opens shards, leaves a mark."""
    path.write_bytes(pickle.dumps(Poison(mark)))
    pickle.loads(path.read_bytes()).close()  # it does what it says
    mark.unlink()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("engine/mp_rank_00_model_states.pt", "flip"),
        ("engine/zero_pp_rank_0_mp_rank_00_optim_states.pt", "cut"),
        ("reference-00000-of-00001.safetensors", "flip"),
        ("engine/mp_rank_00_model_states.pt", "poison"),
        ("state.json", "remove"),
        ("manifest.json", "remove"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(file: str, damage: str):
    place, name = shared_place(), straight(2, 1)
    again = f"damaged-{file.split('/')[-1][:12]}-{damage}"
    path = copy_run(place, name, again) / "step-0000006" / file
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "poison":
        poison(path, place.root / "poisoned")
    else:
        path.unlink()
    output = " ".join(place.train(again).split())
    assert "checkpoint left out:" in output
    assert file in output
    assert "resuming after step 4" in output
    assert place.weights(again) == place.weights(name)
    assert not (place.root / "poisoned").exists()


def test_when_every_checkpoint_is_damaged_it_says_so_and_stops():
    place, name = shared_place(), straight(2, 1)
    folder = copy_run(place, name, "hopeless")
    for step in ("step-0000004", "step-0000006"):
        flip(folder / step / "engine" / "mp_rank_00_model_states.pt")
    output = place.fail("hopeless")
    assert "no checkpoint can be used" in output
    assert "step-0000004/engine/mp_rank_00_model_states.pt has other bytes" in output
    assert f"Delete {folder} to train from the beginning" in output
    assert "Traceback" not in output


def test_the_last_checkpoints_are_kept_and_describe_every_file():
    place, name = shared_place(), straight(2, 2)
    kept = sorted(path.name for path in place.folder(name).glob("step-*"))
    assert kept == ["step-0000004", "step-0000006"]
    folder = place.folder(name) / kept[-1]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(entries) == files - {"manifest.json"}
    state = json.loads((folder / "state.json").read_text())
    assert state == {
        "step": 6, "position": {"epoch": 2, "batches": 0}, "reference_version": 2, "world": 2,
        "beta": {"beta": 5000.0, "factor": 0.5},
    }  # fmt: skip
    shards = [load_file(folder / f"reference-0000{rank}-of-00002.safetensors") for rank in (0, 1)]
    halves = [sum(shard.numel() for shard in rank.values()) for rank in shards]
    assert max(halves) - min(halves) <= len(shards[0])  # at most one element a parameter


def test_a_finished_run_exports_again_when_only_the_pipeline_is_missing():
    place, name = shared_place(), straight(2, 1)
    copy_run(place, name, "unexported")
    output = place.train("unexported")
    assert "resuming after step 6" in output
    assert place.weights("unexported") == place.weights(name)


def test_every_rank_hashes_its_own_files(tmp_path: Path):
    """One rank alone would hash 41 GB for SDXL while the others wait."""
    shards = [f"engine/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    references = [f"reference-{rank:05d}-of-00002.safetensors" for rank in range(2)]
    common = ["engine/mp_rank_00_model_states.pt", "state.json"]
    for name in [*shards, *references, *common]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    own = [describe_own_files(tmp_path, World(rank, 2, CPU)) for rank in range(2)]
    assert set(own[0]) == {shards[0], references[0], *common}
    assert set(own[1]) == {shards[1], references[1]}
    assert own[1][shards[1]]["sha256"] == sha256(shards[1].encode()).hexdigest()


@pytest.mark.parametrize("before", [1, 2, 3, 5])
def test_a_rank_reads_its_part_of_the_reference_from_any_number_of_files(
    before: int, tmp_path: Path
):
    whole = torch.arange(7.0)
    paths = []
    for rank in range(before):
        first, length = shard_bounds(7, rank, before)
        paths.append(reference_file(tmp_path, rank, before))
        save_file({"w": whole[first : first + length].clone()}, paths[-1])
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for now in (1, 2, 4, 9):
            for rank in range(now):
                first, length = shard_bounds(7, rank, now)
                read = read_shard(files, "w", 7, first, length)
                assert torch.equal(read, whole[first : first + length])
