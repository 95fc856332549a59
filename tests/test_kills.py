"""After SIGKILL at any moment, the same command ends with the bits of an undisturbed run."""

import contextlib
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.models.adapter import ADAPTER
from tests.helpers_ranks import Place, Ranks, shared_place, straight
from tests.test_checkpoint import same_journals
from tests.test_train_latents import write_latents

pytestmark = pytest.mark.ranks

STEP, CHECKPOINT, EXPORT = "a step done", "a checkpoint under way", "an export under way"
"""What a killer waits for. The clock alone would, on a slow machine, only ever kill processes that
are starting."""

Moment = tuple[str, int]
"""One of these, and of which step."""


def num_lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_at(moment: Moment, folder: Path, ranks: Ranks, chance: random.Random) -> None:
    """Kill all ranks of the run in `folder` at a moment that follows its progress."""
    began, (kind, step) = time.time(), moment
    name = f".step-{step:07d}.partial" if kind == CHECKPOINT else ".pipeline.partial"

    def reached() -> bool:
        if kind == STEP:
            return num_lines(folder / "journal.jsonl") >= step
        with contextlib.suppress(FileNotFoundError):  # not yet, or renamed meanwhile
            return (folder / name).stat().st_mtime >= began
        return False

    while not reached() and any(process.is_alive() for process in ranks.processes):
        time.sleep(0.001)
    time.sleep(0 if kind == EXPORT else chance.uniform(0, 0.03))
    ranks.kill()


def killed(place: Place, name: str, moments: Sequence[Moment], *more: str, world: int) -> str:
    """A run killed at each of these moments, which ends well at last; what it then printed."""
    chance = random.Random(name)
    for moment in moments:
        kill_at(moment, place.folder(name), place.start(name, *more, world=world), chance)
        assert not (place.folder(name) / "pipeline").exists(), f"{moment} came too late"
    return place.train(name, *more, world=world)


def same_bits(place: Place, name: str, expected: str) -> None:
    """The same result, journal, and last checkpoint with its optimizer's state and reference."""
    assert place.weights(name) == place.weights(expected)
    same_journals(place, name, expected)
    one, two = (place.folder(run) / "step-0000006" for run in (name, expected))
    files = [{p.relative_to(run): p for p in run.rglob("*") if p.is_file()} for run in (one, two)]
    assert files[0].keys() == files[1].keys()
    for path in files[0]:
        if path.suffix in (".pt", ".safetensors"):
            same(*(read(where[path]) for where in files), str(path))
    assert not list(place.folder(name).glob(".*partial"))


def read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=False)  # ours, and of this very test


def same(one: object, two: object, where: str) -> None:
    """Tensors and numbers, at any depth; what else a checkpoint says is no part of the state."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, values in enumerate(zip(one, two, strict=True)):
            same(*values, f"{where}/{index}")
    elif isinstance(one, int | float):
        assert one == two, where


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sigkill_in_a_step_and_in_a_checkpoint(stage: int, precision: str):
    """Two ranks, killed again and again, end with the weights and the journal of a straight run."""
    more = (f"train.precision={precision}", f"zero=stage{stage}", "train.checkpoint_every=1")
    place, name = shared_place(), f"killed-{stage}-{precision}"
    expected = straight(stage, 2, *([more[0]] if precision == "bf16" else []))
    chance = random.Random(f"{stage}/{precision}")
    steps = sorted(chance.sample(range(1, 5), 2))  # step 5 may be the last before a killer comes
    moments = zip(chance.sample((STEP, CHECKPOINT), 2), steps, strict=True)
    assert "resuming after step" in killed(place, name, list(moments), *more, world=2)
    same_bits(place, name, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refresh", "precision", "world"), [("snapshot", "bf16", 2), ("ema", "bf16", 1)]
)
def test_adapter_optimizer_and_reference_survive(refresh: str, precision: str, world: int):
    """LoRA, whose reference is a second adapter: killed in a step, a checkpoint and the export."""
    more = ("tuning=lora", "train.lora.rank=4", f"reference={refresh}", "train.reference.every=2")
    more += (f"train.precision={precision}",)
    place, name = shared_place(), f"killed-lora-{refresh}"
    expected = straight(2, world, *more)
    often = (*more, "train.checkpoint_every=1")
    moments = ((CHECKPOINT, 3), (STEP, 4), (EXPORT, 6))  # the reference has moved after step 2
    output = killed(place, name, moments, *often, world=world)
    assert "resuming after step 6" in output  # of which only the export was missing
    same_bits(place, name, expected)
    adapters = [load_file(place.folder(run) / "lora" / ADAPTER) for run in (name, expected)]
    same(*adapters, "lora")
    shards = load_file(next((place.folder(name) / "step-0000006").glob("reference-*")))
    assert shards, "the reference is not in the checkpoint"
    assert any(shard.any() for name, shard in shards.items() if "lora_B" in name)  # it has moved


@pytest.mark.slow
def test_a_run_on_latents_survives():
    """Latents of stage one in the images' place, a part of them mirrored."""
    place, more = shared_place(), ("train.flip=true", "train.latents=always")
    write_latents(place.root, dtype="fp16")
    for name in ("straight-latents", "killed-latents"):
        shutil.copytree(place.root / "latents", place.root / "runs" / name / "latents")
    place.train("straight-latents", *more)
    often = (*more, "train.checkpoint_every=1")
    killed(place, "killed-latents", ((STEP, 2), (CHECKPOINT, 4)), *often, world=1)
    same_bits(place, "killed-latents", "straight-latents")
