"""Pieces of work in forked processes, some at a time; the parent imports the libraries once.

Measured on a busy machine of two cores: importing torch, DeepSpeed, diffusers and the rest takes a
process 4.6 s of computing and 16 s by the clock, a fork 0.15 s. The parent imports and waits; it
runs no tensor and no query, for threads do not survive a fork.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.5
PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something to do in a process of its own."""

    name: str
    log: Path
    """Takes everything that the process prints."""
    work: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """How a piece ended."""

    piece: Piece
    seconds: float
    """Of computing (user and system time): what it takes on a core of its own."""
    failed: bool


def run(pieces: Sequence[Piece], jobs: int) -> Iterator[Finished | None]:
    """Do all pieces, `jobs` at a time, in order; yields each end, and None as time goes by.

    A piece that fails stops no other. However the parent ends, its children end too: two of them
    at work on one run folder would be one too many.
    """
    waiting, running = list(reversed(pieces)), dict[int, Piece]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                piece = waiting.pop()
                running[_fork(piece)] = piece
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if pid in running:
                seconds = used.ru_utime + used.ru_stime
                yield Finished(running.pop(pid), seconds, failed=status != 0)
            else:
                time.sleep(POLL_S)
                yield None
    finally:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork(piece: Piece) -> int:
    piece.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _end_with_parent()
        sys.stdout = sys.stderr = log = piece.log.open("a", buffering=1)
        os.dup2(log.fileno(), 1)  # for what libraries and children of ours print
        os.dup2(log.fileno(), 2)
        piece.work()
        code = 0
    except BaseException:  # noqa: BLE001  the process ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
