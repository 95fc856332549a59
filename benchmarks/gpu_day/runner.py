"""Runs parts one after another, each in a process of its own that writes its result as it ends.

The next part's process imports the libraries while this one computes, and then waits for its turn.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.machine import compile_nothing, hide_gpus
from benchmarks.gpu_day.parts import Part
from data.artifacts.atomic import write_json

MACHINE = ("device", "code", "versions")
"""The facts that a result depends on."""
LEAST_S = 10.0
"""With less time than this left, no part is begun."""
LOG_LINES = 5
POLL_S, GRACE_S = 1.0, 5.0
"""Between two looks for a part's result, and for its process to end after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """Where the results are, and what makes a result that is there still count."""

    folder: Path
    dry: bool
    facts: Mapping[str, Any]
    """`machine.facts`."""

    def result_path(self, part: Part) -> Path:
        """The part's file."""
        return self.folder / "parts" / f"{part.name.replace(' ', '-')}.json"

    def log(self, part: Part) -> Path:
        """What the part's process printed."""
        return self.folder / "logs" / f"{part.name.replace(' ', '-')}.txt"

    def identity(self, part: Part) -> dict[str, Any]:
        """What a result depends on."""
        known = {"part": part.name, "settings": part.settings(dry=self.dry)}
        known |= {name: self.facts[name] for name in MACHINE}
        plain: dict[str, Any] = json.loads(json.dumps(known))
        return plain

    def result(self, part: Part) -> dict[str, Any] | None:
        """The part's result, if it was measured with this code, device and settings."""
        path = self.result_path(part)
        if not path.is_file():
            return None
        value: dict[str, Any] = json.loads(path.read_text())
        identity = self.identity(part)
        return value if {name: value.get(name) for name in identity} == identity else None

    def clear_work(self) -> None:
        """Remove weights, pairs and runs that other code, or another machine, has left."""
        mark, work = self.folder / "work.json", self.folder / "work"
        stamp = {name: self.facts[name] for name in MACHINE}
        if not mark.is_file() or json.loads(mark.read_text()) != stamp:
            shutil.rmtree(work, ignore_errors=True)
            write_json(mark, stamp)

    def is_finished(self, part: Part) -> bool:
        """Whether running the part again would tell nothing new; a failed one is tried again."""
        result = self.result(part)
        return result is not None and ("figures" in result or result["out_of_memory"])


def run(
    day: Day, parts: Sequence[Part], limit_s: float, context: BaseContext
) -> Iterator[tuple[Part, str]]:
    """Run the parts that are not finished, within the limit; yield each when it begins and ends."""
    end = time.monotonic() + limit_s
    waiting = [part for part in parts if not day.is_finished(part)]
    processes: list[_Process] = []
    try:
        for index, part in enumerate(waiting):
            if end - time.monotonic() < LEAST_S:
                return
            ahead = waiting[len(processes) : index + 2]
            processes += [_Process(day, other, context) for other in ahead]
            yield part, "begins"
            processes[index].finish(end)
            yield part, "ends"
    finally:
        for process in processes:
            process.kill()


class _Process:
    """A part's process."""

    def __init__(self, day: Day, part: Part, context: BaseContext) -> None:
        self.day, self.part = day, part
        waits, self.go = context.Pipe(duplex=False)
        day.result_path(part).unlink(missing_ok=True)
        task = _Task(
            function=part.function, settings=part.settings(dry=day.dry), dry=day.dry,
            identity=day.identity(part), result=day.result_path(part), log=day.log(part),
            work=day.folder / "work",
        )  # fmt: skip
        make: Callable[..., Any] = context.Process  # type: ignore[attr-defined]
        self.process = make(target=_do, args=(task, waits))
        self.process.start()
        waits.close()

    def finish(self, end: float) -> None:
        """Let it compute until it ends or its time, or the day's, is over."""
        limit_s = min(self.part.limit_s, end - time.monotonic())
        with suppress(BrokenPipeError):  # it failed before its turn, and has written why
            self.go.send("go")
        path, limit = self.day.result_path(self.part), time.monotonic() + limit_s
        while self.process.is_alive() and time.monotonic() < limit and not path.exists():
            self.process.join(POLL_S)
        self.process.join(GRACE_S if path.exists() else 0)
        ran_out = self.process.is_alive()
        self.kill()
        if path.exists() or (ran_out and limit_s < self.part.limit_s):
            return  # it has a result, or the day is over
        self._record(f"stopped after {limit_s:.0f} s" if ran_out else self._last_words())

    def kill(self) -> None:
        """End it, and what it has started."""
        if self.process.pid is not None and self.process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()

    def _last_words(self) -> str:
        log = self.day.log(self.part)
        lines = log.read_text().splitlines()[-LOG_LINES:] if log.exists() else []
        return f"its process ended with status {self.process.exitcode}: {' / '.join(lines)}"

    def _record(self, error: str) -> None:
        outcome = {"error": error, "out_of_memory": False, "seconds": None}
        write_json(self.day.result_path(self.part), self.day.identity(self.part) | outcome)


# --- in the part's process -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What a part's process has to know."""

    function: str
    settings: dict[str, Any]
    dry: bool
    identity: dict[str, Any]
    result: Path
    log: Path
    work: Path
    """Models, pairs and whatever else the parts share."""


def _do(task: _Task, go: Connection) -> None:
    """Import, wait for the turn, measure, and write the result."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task.log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = log = task.log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    if task.dry:
        hide_gpus()
    began = time.perf_counter()
    try:
        module, _, name = task.function.rpartition(".")
        function = getattr(import_module(module), name)
        if task.dry:
            compile_nothing()
        go.recv()
        began = time.perf_counter()
        outcome = {"figures": function(task.work, **task.settings)}
        json.dumps(outcome, allow_nan=False)
    except BaseException as error:  # whatever it is: the day goes on, and the table says it
        traceback.print_exc()
        outcome = {
            "error": f"{type(error).__name__}: {error}", "out_of_memory": _is_out_of_memory(error),
        }  # fmt: skip
    write_json(task.result, task.identity | outcome | {"seconds": time.perf_counter() - began})


def _is_out_of_memory(error: BaseException) -> bool:
    from data.devices import is_out_of_memory

    return is_out_of_memory(error)


def _end_with_parent() -> None:
    """End this process and what it started when its parent has ended, even by SIGKILL."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
