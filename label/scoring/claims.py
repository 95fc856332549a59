"""Who is at work on which pair shard: small files that keep two processes from the same work.

They only save time. A shard that is scored twice is the same twice, and a file is renamed into its
place whole, so a claim that is wrongly thought dead does no harm.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

BEAT_S = 5.0
"""Seconds between two signs of life."""
DEAD_S = 60.0
"""Seconds without one after which a process on another machine is taken for dead."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim file says."""

    machine: str
    pid: int
    rows: int
    """Pairs of the shard that were read so far."""
    age_s: float
    """Seconds since the last sign of life, by the clock of the file system."""

    @property
    def alive(self) -> bool:
        """Whether its process still works; known for sure on its own machine."""
        return self.age_s < DEAD_S and (self.machine != machine() or _runs(self.pid))


class Claims:
    """This process's claims, kept alive by a thread, and a look at those of others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine: dict[int, int] = {}
        self._lock = Lock()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life during a `with` block, then release what is still claimed."""
        stop = Event()
        thread = Thread(target=self._beat, args=[stop], daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            for index in list(self._mine):
                self.release(index)

    def take(self, index: int, *, even_if_alive: bool = False) -> bool:
        """Claim a shard; false when another process is at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(index)
        with self._lock:
            if index in self._mine:
                return False
            try:
                with path.open("x") as file:
                    file.write(self._says(0))
            except FileExistsError:
                found = self.read(index)
                if found is not None and found.alive and not even_if_alive:
                    return False
                path.write_text(self._says(0))
            self._mine[index] = 0
        return True

    def release(self, index: int) -> None:
        """Give a shard up, scored or not."""
        with self._lock:
            self._mine.pop(index, None)
            if (found := self.read(index)) is not None and self._is_mine(found):
                self._path(index).unlink(missing_ok=True)

    def advance(self, index: int, rows: int) -> None:
        """Note that more pairs of a claimed shard were read; the next beat tells others."""
        with self._lock:
            if index in self._mine:
                self._mine[index] += rows

    def read(self, index: int) -> Claim | None:
        """The claim on a shard; None where nobody claims it."""
        path = self._path(index)
        try:
            age = self._now() - path.stat().st_mtime
            says = json.loads(path.read_text())
            return Claim(says["machine"], says["pid"], says["rows"], age)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError):  # read while it was written
            return Claim("", 0, 0, age)

    def rows(self) -> dict[int, int]:
        """Pairs read so far of each shard that is claimed, by any process."""
        with contextlib.suppress(FileNotFoundError):
            indices = [int(path.stem) for path in self.folder.glob("*.json")]
            found = {index: self.read(index) for index in indices}
            others = {index: claim.rows for index, claim in found.items() if claim is not None}
            return others | dict(self._mine)
        return dict(self._mine)

    def clear(self) -> None:
        """Remove what dead processes left, when nothing is left to claim."""
        for path in self.folder.glob("*.json"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _beat(self, stop: Event) -> None:
        while not stop.wait(BEAT_S):
            with self._lock, contextlib.suppress(OSError):  # a full disk is for others to report
                for index, rows in self._mine.items():
                    found = self.read(index)
                    if found is not None and self._is_mine(found):
                        self._path(index).write_text(self._says(rows))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"

    def _now(self) -> float:
        """The time by the clock that dates files, which is the server's on a network disk."""
        with contextlib.suppress(OSError):
            os.utime(self.folder)
            return self.folder.stat().st_mtime
        return time.time()

    def _is_mine(self, claim: Claim) -> bool:
        return claim.machine == machine() and claim.pid == os.getpid()

    @staticmethod
    def _says(rows: int) -> str:
        return json.dumps({"machine": machine(), "pid": os.getpid(), "rows": rows})


def machine() -> str:
    """Names the system that counts our process ids: containers may share a host name."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
