"""Claims on shards, and what a rank takes when others are slow, dead or hung."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.distributed import Rank
from data.pairs.schema import PairShard
from label.scoring import claims as module
from label.scoring.claims import Claims, machine
from label.scoring.progress import Look
from label.scoring.score_sets import FACTS, ScoreSets, claim_work, plan, wait_for_change


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "claims")


@pytest.fixture
def sets(tmp_path: Path) -> ScoreSets:
    shards = [PairShard(i, f"{i}.parquet", f"{i}.parquet", 10 + i, 1) for i in range(10)]
    return ScoreSets(tmp_path, tuple(shards), {})


def claim_of(folder: Path, index: int, where: str, pid: int, age_s: float, rows: int = 0) -> None:
    """A claim of another process."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{index:05d}.json"
    path.write_text(json.dumps({"machine": where, "pid": pid, "rows": rows}))
    os.utime(path, (time.time() - age_s,) * 2)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def taken(sets: ScoreSets, rank: Rank, claims: Claims, **more: bool) -> list[int]:
    return [work.shard.index for work in claim_work(sets, rank, claims, **more)]


def test_one_process_has_a_shard(claims: Claims) -> None:
    assert claims.take(3)
    assert not claims.take(3)
    assert not Claims(claims.folder).take(3)  # alive: it is this process
    claims.advance(3, 64)
    claims.advance(3, 64)
    assert claims.rows() == {3: 128}
    claims.release(3)
    assert Claims(claims.folder).take(3)


@pytest.mark.parametrize(
    ("where", "pid", "age_s", "free"),
    [
        ("elsewhere", 1, module.DEAD_S / 2, False),
        ("elsewhere", 1, module.DEAD_S * 2, True),
        (machine(), os.getpid(), module.DEAD_S / 2, False),
        (machine(), None, 0, True),
    ],
    ids=["alive elsewhere", "no sign of life", "alive here", "dead here, known at once"],
)
def test_what_the_dead_leave_is_taken(
    claims: Claims, where: str, pid: int | None, age_s: float, free: bool
) -> None:
    claim_of(claims.folder, 0, where, dead_pid() if pid is None else pid, age_s)
    assert claims.take(0, even_if_alive=False) is free
    if not free:
        assert claims.take(0, even_if_alive=True)
    found = claims.read(0)
    assert found is not None
    assert (found.machine, found.pid, found.alive) == (machine(), os.getpid(), True)


def test_a_claim_that_is_just_being_written_counts(claims: Claims) -> None:
    claims.folder.mkdir()
    (claims.folder / "00000.json").write_text("")
    assert not claims.take(0)
    assert claims.rows() == {0: 0}


def test_signs_of_life(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    path = claims.folder / "00004.json"
    with claims.beating():
        claims.take(4)
        claims.take(5)
        claims.advance(4, 64)
        old = time.time() - 1000
        os.utime(path, (old, old))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < old + 500 or json.loads(path.read_text() or "{}") == {}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr(module, "BEAT_S", 3600)
        time.sleep(0.2)  # the last quick beat is over
        claim_of(claims.folder, 5, "elsewhere", 1, 0)  # taken over by another
    assert sorted(path.name for path in claims.folder.iterdir()) == ["00005.json"]
    found = claims.read(5)
    assert found is not None
    assert found.machine == "elsewhere"
    claims.clear()
    assert not claims.folder.exists()


def test_own_block_first_then_what_others_have_not_begun(sets: ScoreSets, claims: Claims) -> None:
    assert [work.shard.index for work in plan(sets, Rank(1, 3))] == [3, 4, 5]
    for world in (1, 2, 3, 7, 12):
        shares = [[one.shard.index for one in plan(sets, Rank(r, world))] for r in range(world)]
        assert sum(shares, []) == list(range(10))  # neighbours stay together
    claim_of(claims.folder, 6, "elsewhere", 1, 0)  # the next rank has begun its block
    assert taken(sets, Rank(1, 3), claims) == [3, 4, 5, 9, 8, 7, 2, 1, 0]
    assert taken(sets, Rank(0, 3), Claims(claims.folder)) == []


def test_a_shard_that_was_finished_meanwhile_is_not_taken(sets: ScoreSets, claims: Claims) -> None:
    work = claim_work(sets, Rank(), claims)
    assert next(work).shard.index == 0
    path = sets.path(FACTS, sets.shards[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert next(work).shard.index == 2


def test_waiting_ends_when_somebody_dies_or_nothing_happens(
    sets: ScoreSets, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("label.scoring.score_sets.POLL_S", 0.01)
    for index in range(10):
        claim_of(claims.folder, index, "elsewhere", 1, 0)
    assert not wait_for_change(sets, claims, 0.05)  # all alive, none goes on
    assert taken(sets, Rank(), claims) == []
    assert sorted(taken(sets, Rank(), claims, even_if_alive=True)) == list(range(10))
    claim_of(claims.folder, 3, "elsewhere", 1, module.DEAD_S + 1)
    assert wait_for_change(sets, claims, 60.0)


def test_the_bar_counts_files_and_claims_of_all(sets: ScoreSets, claims: Claims) -> None:
    look = Look(sets, claims)
    assert (look.total, look.done()) == (sum(range(10, 20)), 0)
    for index in (0, 4):
        path = sets.path(FACTS, sets.shards[index])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    claim_of(claims.folder, 4, "elsewhere", 1, 0, rows=14)  # finished, not yet released
    claim_of(claims.folder, 5, "elsewhere", 1, 0, rows=7)
    claims.take(6)
    claims.advance(6, 12)
    claims.advance(6, 12)
    assert look.done() == 10 + 14 + 7 + 16
