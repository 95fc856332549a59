"""What ends one process of a run ends all within a minute, and the same command goes on."""

import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.artifacts.parquet_io import write_table
from tests.helpers_ranks import Place, Ranks, shared_place, start_ranks, straight, train_main
from train.distributed import watch
from train.distributed.deepspeed_engine import start
from train.distributed.watch import Watch

SILENCE_S = 6.0
MORE = ("zero=stage2", "train.checkpoint_every=1", f"train.silence_s={SILENCE_S}")


def train_as(overrides: list[str], of_rank_1: list[str]) -> None:
    """A rank of a run; rank 1 is started with other settings."""
    train_main(overrides + (of_rank_1 if os.environ["RANK"] == "1" else []))


def begin(place: Place, name: str, *of_rank_1: str, steps: int = 6) -> Ranks:
    place.label(name)
    overrides = place.overrides(name, *MORE, f"train.steps={steps}")
    return start_ranks(place.root / "logs" / name, 2, train_as, overrides, list(of_rank_1))


def until_steps(place: Place, name: str, steps: int, ranks: Ranks) -> None:
    journal = place.folder(name) / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < steps:
        assert all(process.is_alive() for process in ranks.processes), ranks.output
        time.sleep(0.001)


def ended(ranks: Ranks, *which: int, within_s: float = 60) -> list[str]:
    """What each process printed; all must end in time, with an error."""
    deadline = time.monotonic() + within_s
    for rank in which or range(len(ranks.processes)):
        ranks.processes[rank].join(max(0.0, deadline - time.monotonic()))
        assert ranks.processes[rank].exitcode not in (None, 0), ranks.output
    return [log.read_text() for log in ranks.logs]


def goes_on(place: Place, name: str) -> None:
    output = place.train(name, *MORE, world=2)
    assert "going on after step" in output
    assert place.weights(name) == place.weights(straight(2, 2))


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other(victim: int):
    place, name = shared_place(), f"killed-{victim}"
    ranks = begin(place, name)
    until_steps(place, name, 2, ranks)
    ranks.processes[victim].kill()
    said = ended(ranks, within_s=20)[1 - victim]
    assert re.search(rf"error: rank {victim} \(.*\) ended without a word: was it killed", said)
    assert f"rank {1 - victim} (pid" in said
    assert "ends as well; the same command goes on" in said
    assert "Traceback" not in said
    goes_on(place, name)


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_other(victim: int):
    place, name = shared_place(), f"stopped-{victim}"
    ranks = begin(place, name)
    until_steps(place, name, 2, ranks)
    os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
    said = ended(ranks, 1 - victim)[1 - victim]
    assert re.search(rf"error: rank {victim} \(.*\) has not been heard for 6 s: it hangs", said)
    assert "Traceback" not in said
    os.kill(ranks.processes[victim].pid, signal.SIGCONT)
    ended(ranks, victim)  # it finds that the other has gone
    goes_on(place, name)


@pytest.mark.ranks
def test_a_process_that_fails_ends_the_other_and_its_error_is_shown_by_both(tmp_path: Path):
    place, name = shared_place(), "torn"
    torn = tmp_path / "pairs"
    shutil.copytree(place.root / "pairs", torn)
    for path in torn.glob("*.parquet"):
        table = pq.read_table(path)
        cut = [image[:60] for image in table["jpg_0"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("jpg_0"), "jpg_0", [cut])
        write_table(path, table, row_group_rows=6)
    ranks = begin(place, name, f"pairs.root={torn}")
    first, second = ended(ranks, within_s=20)
    why = r"image 0 of pair .* cannot be read any more"
    assert re.search(rf"^error: {why}", second, re.MULTILINE)
    assert re.search(rf"^error: rank 1 \(.*\) failed: ShardError: {why}", first, re.MULTILINE)
    assert "Traceback" not in first + second
    assert not (place.folder(name) / "pipeline").exists()
    place.train(name, *MORE, world=2)
    assert place.weights(name) == place.weights(straight(2, 2))


@pytest.mark.ranks
def test_processes_that_stood_still_together_go_on():
    """A scheduler suspends a job and resumes it; nobody is dead."""
    place, name = shared_place(), "suspended"
    ranks = begin(place, name)
    until_steps(place, name, 2, ranks)
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks.processes:
            os.kill(process.pid, signum)
        time.sleep(SILENCE_S + 1 if signum == signal.SIGSTOP else 0)
    assert ranks.wait() == 0, ranks.output
    assert place.weights(name) == place.weights(straight(2, 2))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        ("train.lr=2e-3", r"rank 0 was started with other settings than rank 1 \(lr: found 0.001"),
        ("runs=/nowhere", r"/nowhere/\S+ holds no complete label set; run `make labels` first"),
        ("runs={elsewhere}", r"/elsewhere/alone on \S+ is another folder than that of rank 0"),
    ],
)
def test_machines_that_are_not_set_up_alike_are_told_so(
    of_rank_1: str, message: str, tmp_path: Path
):
    """Rank 0 finds nothing wrong, and would wait for the others."""
    place, elsewhere = shared_place(), tmp_path / "elsewhere"
    place.label("alone")
    shutil.copytree(place.root / "runs" / "alone" / "labels", elsewhere / "alone" / "labels")
    ranks = begin(place, "alone", of_rank_1.format(elsewhere=elsewhere))
    first, second = ended(ranks)
    assert re.search(rf"error: rank 1 \(.*\) failed: \w+: .*{message}", first)
    assert re.search(rf"^error: .*{message}", second, re.MULTILINE)


# --- the connections themselves ------------------------------------------------------------------


def waits_for_rank_1() -> None:
    watch.JOIN_S = 2.0
    if os.environ["RANK"] == "0":
        watch.join(SILENCE_S)
        time.sleep(30)


@pytest.mark.ranks
def test_a_process_that_never_comes_is_not_waited_for_without_end(tmp_path: Path):
    ranks = start_ranks(tmp_path, 2, waits_for_rank_1)
    said = ended(ranks, 0, within_s=20)[0]
    assert re.search(r"JoinError: rank 0 \(.*\) and the others did not meet at MASTER_A", said)


def waits_for_a_busy_one() -> None:
    world = start("cpu", patience_s=3.0)
    if world.rank == 1:
        time.sleep(60)
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
        world.barrier()


@pytest.mark.ranks
def test_a_process_that_is_there_but_does_not_come_is_waited_for_with_patience(tmp_path: Path):
    ranks = start_ranks(tmp_path, 2, waits_for_a_busy_one)
    ranks.processes[0].join(40)
    assert ranks.processes[0].exitcode == 0, ranks.output
    ranks.kill()


class Calm(Watch):
    """One that notes what would have ended the process."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2, SILENCE_S)
        self.noticed: list[str] = []

    def _end(self, what: str) -> None:
        self.noticed.append(what)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def two() -> tuple[Calm, Calm]:
    """Rank 0 and rank 1, connected, in this process."""
    first, second = Calm(0), Calm(1)
    second.connect("127.0.0.1", first.listen())
    for one in (first, second):
        threading.Thread(target=one.run, daemon=True).start()
    eventually(lambda: not first.awaited)
    return first, second


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    """Where the launcher keeps the store, rank 0 finds it, but nobody comes."""
    monkeypatch.setattr(watch, "JOIN_S", 0.1)
    alone = Calm(0)
    alone.listen()
    threading.Thread(target=alone.run, daemon=True).start()
    eventually(lambda: alone.noticed)
    assert alone.noticed[0] == "rank 1 did not come within 0 s"


def test_a_stranger_at_the_port_does_no_harm():
    first, second = two()
    port = next(
        key.fileobj.getsockname()[1] for key in first.selector.get_map().values() if not key.data
    )
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"failed": "no"}\n', b"[1]\n", b"\xff\n", b""):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(said)
            assert not said or stranger.recv(10) == b""
    eventually(lambda: len(first.links) == 1)
    assert first.noticed == second.noticed == []


def test_a_farewell_is_no_death():
    first, second = two()
    first.leave()
    eventually(lambda: not second.links)
    assert second.noticed == []


def test_what_fails_is_handed_on_in_its_own_words():
    first, second = two()
    second.fail(ValueError("two\nlines"))
    eventually(lambda: first.noticed)
    assert first.noticed == [f"{second.who} failed: ValueError: two\nlines"]
