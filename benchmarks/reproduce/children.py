"""Runs pieces of work in processes forked from a server that has imported the libraries once.

Measured on a busy machine of two cores: importing torch, DeepSpeed, diffusers and the rest takes a
process 4.6 s of computing and 16 s by the clock, a fork 0.15 s.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD = ["benchmarks.reproduce.preload"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Something to do in a process of its own."""

    name: str
    log: Path
    """Gets everything that the process prints."""
    work: Callable[[], None]
    """A function that can be pickled."""
    needs: frozenset[str] = frozenset()
    """The names of pieces that have to be done before."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a piece ended."""

    piece: Piece
    seconds: float
    """CPU time (user and system): how long it takes on a core of its own."""
    failed: bool


def context() -> ForkServerContext:
    """Processes that are forks of the server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def run(pieces: Sequence[Piece], jobs: int) -> Iterator[Finished]:
    """Do all pieces, `jobs` at a time, always the first that is ready, and yield each at its end.

    A piece that fails stops no other, except that those which need it are not started. When this
    process ends in any way, its children end too, so that no two processes ever work on one run
    folder.
    """
    processes = context()
    waiting, running = list(pieces), dict[ForkServerProcess, tuple[Piece, Any]]()
    done: set[str] = set()
    try:
        while True:
            while len(running) < jobs and (piece := _first_ready(waiting, done)):
                waiting.remove(piece)
                seconds = processes.Value("d", 0.0, lock=False)
                process = processes.Process(target=_do, args=(piece, seconds))
                process.start()
                running[process] = piece, seconds
            if not running:
                return  # what still waits needs a piece that failed
            ready = wait([process.sentinel for process in running])
            for process in [each for each in running if each.sentinel in ready]:
                piece, seconds = running.pop(process)
                process.join()
                if process.exitcode == 0:
                    done.add(piece.name)
                yield Finished(piece, seconds.value, failed=process.exitcode != 0)
    finally:
        for process in running:
            process.terminate()
            process.join()


def _first_ready(waiting: Sequence[Piece], done: set[str]) -> Piece | None:
    return next((piece for piece in waiting if piece.needs <= done), None)


def _do(piece: Piece, seconds: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    piece.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = log = piece.log.open("a", buffering=1)
    for descriptor in (1, 2):  # what libraries and child processes print
        os.dup2(log.fileno(), descriptor)
    piece.work()
    used = os.times()
    seconds.value = used.user + used.system + used.children_user + used.children_system


def _end_with_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
