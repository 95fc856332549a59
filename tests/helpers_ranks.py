"""Programs and gloo ranks in tests, forked from a server that has imported everything once."""

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection, Listener, wait
from multiprocessing.reduction import recv_handle
from pathlib import Path
from threading import Thread

from data.artifacts.atomic import sha256_of
from tests import as_fork
from tests.helpers_train import SIDE, write_base, write_labels, write_pairs

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """One thread a process: the cores are shared with the other ranks and tests."""
    own = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "COLUMNS": "200",
    }
    path = os.pathsep.join(
        dict.fromkeys([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    return own | {"PYTHONPATH": path.rstrip(os.pathsep), "TQDM_DISABLE": "1"}


@cache
def context() -> "multiprocessing.context.ForkServerContext":
    """Processes forked from a server that has imported everything once: 0.1 s instead of 15 s."""
    os.environ.update(environment())
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.helpers_preload"])
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _be_rank(rank: int, world: int, port: int, log: str, target: Callable, args: tuple) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update(environment() | address | {name: str(v) for name, v in names.items()})
    if world == 1:  # as `python -m train` without a launcher
        for name in (*names, *address):
            os.environ.pop(name)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    target(*args)
    sys.stdout.flush()


def be_module(module: str, arguments: Sequence[str]) -> None:
    """What `python -m module ...` does, without starting an interpreter."""
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def train_main(overrides: list[str]) -> None:
    """What `python -m train ...` does."""
    be_module("train", overrides)


def _be_program(
    module: str, arguments: Sequence[str], stdout: str, stderr: str, variables: dict[str, str]
) -> None:
    os.environ.update(environment() | variables)
    sys.executable = variables.get(as_fork.PYTHON, sys.executable)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    be_module(module, arguments)


def start_module(
    folder: Path, module: str, *arguments: str, forks: bool = False
) -> "multiprocessing.Process":
    """Start `python -m module ...` as a fork; what it prints goes to two files in the folder.

    With `forks` the programs that it starts with its own Python are forks, too.
    """
    variables = launcher_environment() if forks else {}
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (str(folder / name) for name in ("stdout", "stderr"))
    process = context().Process(target=_be_program, args=(module, arguments, out, err, variables))
    process.start()
    return process


def run_module(
    folder: Path, module: str, *arguments: str, timeout_s: float = 300, forks: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module ...` as a fork to its end."""
    process = start_module(folder, module, *arguments, forks=forks)
    process.join(timeout_s)
    out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{module} takes more than {timeout_s} s:\n{out}{err}")
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, out, err)


# --- ranks of a real launcher --------------------------------------------------------------------


def _be_module_of_launcher(
    variables: dict[str, str], words: Sequence[str], *streams: resource_sharer.DupFd
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.detach(), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.executable = variables[as_fork.PYTHON]
    module, *arguments = words
    be_module(module, arguments)


def _serve_fork(connection: Connection) -> None:
    """Run what one `tests.as_fork` asks for; when that is killed, so is its fork."""
    variables, words = connection.recv()
    descriptors = [recv_handle(connection) for _ in range(3)]
    streams = [resource_sharer.DupFd(descriptor) for descriptor in descriptors]
    process = context().Process(
        target=_be_module_of_launcher, args=(variables, words, *streams), daemon=False
    )
    process.start()
    for descriptor in descriptors:
        os.close(descriptor)
    wait([connection, process.sentinel])
    if process.is_alive():
        process.kill()
    process.join()
    with contextlib.suppress(OSError):
        connection.send(process.exitcode)
    connection.close()


def launcher_environment() -> dict[str, str]:
    """Variables under which `python -m`, `torchrun` and `deepspeed` are those of `launchers`."""
    folder = launchers()
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PY": f"{folder}/python", as_fork.PYTHON: f"{folder}/python"}
    return environment() | own | {as_fork.ADDRESS: fork_address()}


@cache
def launchers() -> Path:
    """A folder with launchers that become forks, and so do the modules that these start."""
    folder = Path(tempfile.mkdtemp(prefix="balanceddpo-launchers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fork = f"exec {sys.executable} -m {as_fork.__name__}"
    for name, lines in {
        "python": f'[ "$1" = -u ] && shift\n[ "$1" = -m ] && shift || exit 9\n{fork} "$@"',
        "torchrun": f'{fork} torch.distributed.run "$@"',
        "deepspeed": f'{fork} deepspeed.launcher.runner "$@"',
    }.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)
    return folder


@cache
def fork_address() -> str:
    """Where each `python -m tests.as_fork` asks for its fork."""
    listener = Listener(family="AF_UNIX")

    def serve() -> None:
        while True:
            Thread(target=_serve_fork, args=(listener.accept(),), daemon=True).start()

    Thread(target=serve, daemon=True).start()
    return str(listener.address)


@dataclass
class Ranks:
    """Processes under way."""

    processes: list
    logs: list[Path]

    @property
    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, timeout_s: float = 240) -> int:
        """The first exit status that is not 0, or 0; when one rank fails the others are stopped."""
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            if failed or time.monotonic() > deadline:
                time.sleep(0.5)  # let the others say what they see
                self.kill()
            time.sleep(0.02)
        assert time.monotonic() <= deadline, f"too slow:\n{self.output}"
        return next((p.exitcode for p in self.processes if p.exitcode), 0)

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start_ranks(folder: Path, world: int, target: Callable, *args: object) -> Ranks:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = [
        context().Process(target=_be_rank, args=(rank, world, port, str(logs[rank]), target, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, logs)


def run_ranks(folder: Path, world: int, target: Callable, *args: object) -> str:
    """Run a function as `world` gloo ranks; fails with their output when one fails."""
    ranks = start_ranks(folder, world, target, *args)
    assert ranks.wait() == 0, ranks.output
    return ranks.output


@dataclass(frozen=True)
class Place:
    """Everything a run needs, below one folder."""

    root: Path

    def overrides(self, run: str, *more: str) -> list[str]:
        defaults = [
            f"run={run}", f"runs={self.root}/runs", f"pairs.root={self.root}/pairs",
            "pairs=pickapic", f"model.path={self.root}/base", f"model.resolution={SIDE}",
            "train.steps=6", "train.batch=8", "train.micro_batch=4", "train.checkpoint_every=2",
            "train.warmup=2", "train.lr=1e-3", "train.reference.every=3", "train.window=2",
            "train.device=cpu",
        ]  # fmt: skip
        names = {text.split("=")[0] for text in more}
        return [text for text in defaults if text.split("=")[0] not in names] + list(more)

    def folder(self, run: str) -> Path:
        return self.root / "runs" / run / "train"

    def label(self, run: str, **kwargs: int) -> None:
        folder = self.root / "runs" / run / "labels" / "majority"
        if not folder.exists():
            write_labels(folder, self.root / "pairs", **kwargs)

    def start(self, run: str, *more: str, world: int = 1) -> Ranks:
        """Begin, or continue, a run."""
        self.label(run)
        log = self.root / "logs" / run
        return start_ranks(log, world, train_main, self.overrides(run, *more))

    def train(self, run: str, *more: str, world: int = 1) -> str:
        """A run to its end; what it printed."""
        ranks = self.start(run, *more, world=world)
        assert ranks.wait() == 0, ranks.output
        return ranks.output

    def fail(self, run: str, *more: str, world: int = 1) -> str:
        """A run that must fail; what it printed."""
        ranks = self.start(run, *more, world=world)
        assert ranks.wait() != 0, ranks.output
        return ranks.output

    def journal(self, run: str) -> list[dict]:
        text = (self.folder(run) / "journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def result(self, run: str, pipeline: str = "pipeline") -> Path:
        """The file of the trained weights."""
        return self.folder(run) / pipeline / "unet/diffusion_pytorch_model.safetensors"

    def weights(self, run: str, pipeline: str = "pipeline") -> str:
        """SHA-256 of the result."""
        return sha256_of(self.result(run, pipeline))


def build(root: Path) -> None:
    write_base(root / "base")
    write_pairs(root / "pairs")


def make_place(root: Path) -> Place:
    """A place, made in a child so that this process need not import diffusers."""
    run_ranks(root / "logs" / "build", 1, build, root)
    return Place(root)


@cache
def shared_place() -> Place:
    """One place for all tests of a session, so that a straight run is run once."""
    folder = Path(tempfile.mkdtemp(prefix="balanceddpo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_place(folder)


@cache
def straight(stage: int, world: int, *more: str) -> str:
    """An undisturbed run in the shared place; its name."""
    name = f"straight-{stage}-{world}" + "".join(f"-{text.split('=')[1]}" for text in more)
    shared_place().train(name, f"zero=stage{stage}", *more, world=world)
    return name
