"""The commands of docs/many-machines.md, on one machine that stands for two."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from data.distributed import adopt_srun, first_machine, without_local_rank
from tests import as_fork
from tests.helpers_ranks import ROOT, free_port, launcher_environment, shared_place
from tests.test_conf import job

GUIDE = (ROOT / "docs" / "many-machines.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]
ALONE, C10D, STATIC_0, STATIC_1, PDSH, NO_SSH_0, NO_SSH_1 = COMMANDS
(SCRIPT,) = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)

STUBS = {
    # A step of one task on each of two machines
    "srun": """#!/bin/bash
        [ "$1" = --kill-on-bad-exit=1 ] && shift || exit 9
        export SLURM_JOB_ID=$PORT SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=127.0.0.[1-2]
        for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & done
        wait -n && wait -n""",
    # pdsh -S -f 1024 -w one,two command, as if both machines were this one
    "pdsh": """#!/bin/bash
        [ "$1 $2 $4" = "-S -f -w" ] && hosts=$5 && shift 5 || exit 9
        number=0
        for host in ${hosts//,/ }; do bash -c "${*//%n/$number}" & number=$((number + 1)); done
        wait -n && wait -n""",
    "ssh": "#!/bin/bash\n",
    "hosts": "127.0.0.1 slots=1\nlocalhost slots=1",
}
TWO = ("experiment=miniature", "zero=stage2", "train.checkpoint_every=1")


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    for name, text in STUBS.items():
        path = tmp_path / name
        path.write_text(text + "\n")
        path.chmod(0o755)
    (tmp_path / "job.sh").write_text(SCRIPT)
    return tmp_path


@cache
def expected() -> str:
    """The weights of two processes without any launcher."""
    shared_place().train("unlaunched", *TWO, world=2)
    return shared_place().weights("unlaunched")


def start(command: str, name: str, stubs: Path, port: int) -> subprocess.Popen:
    """A command of the guide, with one process a machine, on the shared place's tiny run."""
    place = shared_place()
    place.label(name)
    for old, new in (
        ("--nproc-per-node=8", "--nproc-per-node=1"), ("29500", str(port)),
        ("10.0.0.1", "127.0.0.1"), ("node1", "127.0.0.1"), ("hosts", f"{stubs}/hosts"),
        ("--module", f"--master_port={port} --module"), (" train ", f" {as_fork.__name__} "),
    ):  # fmt: skip
        command = command.replace(old, new)
    path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = launcher_environment() | {"PATH": path, "PY": sys.executable, "PORT": str(port)}
    own |= {"STAGE": as_fork.__name__}
    with (stubs / f"{len(list(stubs.iterdir()))}.log").open("w") as log:
        return subprocess.Popen(
            [*shlex.split(command), *place.overrides(name, *TWO)],
            cwd=ROOT, env=os.environ | own, stdout=log, stderr=log,
        )  # fmt: skip


def said(stubs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(stubs.glob("*.log")))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("c10d", (C10D, C10D)),
        ("slurm", ("bash job.sh",)),
        ("pdsh", (PDSH,)),
    ],
)
def test_every_launcher_trains_the_same_weights(name: str, commands: tuple[str, ...], stubs: Path):
    port = free_port()
    programs = [
        start(command.replace("job.sh", f"{stubs}/job.sh"), name, stubs, port)
        for command in commands
    ]
    assert [program.wait(300) for program in programs] == [0] * len(commands), said(stubs)
    assert said(stubs).count("trained 6 steps") == 1  # by one process alone
    assert shared_place().weights(name) == expected()


def ranks_of(agent: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started."""
    tasks = Path(f"/proc/{agent.pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.slow
@pytest.mark.ranks
def test_a_machine_that_dies_ends_the_others_and_the_run_goes_on(stubs: Path):
    """Two agents of torchrun, which share nothing but the network; then two of DeepSpeed's."""
    place, name, port = shared_place(), "two-agents", free_port()
    agents = [start(command, name, stubs, port) for command in (STATIC_0, STATIC_1)]
    journal = place.folder(name) / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert [agent.poll() for agent in agents] == [None, None], said(stubs)
        time.sleep(0.001)
    for victim in (*ranks_of(agents[1]), agents[1].pid):
        os.kill(victim, signal.SIGKILL)
    agents[1].wait(10)
    assert agents[0].wait(60) != 0
    assert re.search(r"error: rank 1 \(pid \d+ on .*\) ended without a word", said(stubs))
    assert "the same command goes on" in said(stubs)
    assert not place.folder(name).joinpath("pipeline").exists()
    port = free_port()
    again = [start(command, name, stubs, port) for command in (NO_SSH_0, NO_SSH_1)]
    assert [agent.wait(300) for agent in again] == [0, 0], said(stubs)
    assert "going on after step" in said(stubs)
    assert place.weights(name) == expected()


# --- what launchers say --------------------------------------------------------------------------


def test_srun_is_heard_only_inside_a_step_and_after_other_launchers():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "9"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2"}
    for given, rank, world in (
        (batch, None, None),
        (batch | step, "9", "16"),
        (batch | step | torchrun, "1", "2"),
    ):
        found = dict(given)
        adopt_srun(found)
        assert (found.get("RANK"), found.get("WORLD_SIZE")) == (rank, world)
    found = batch | step
    adopt_srun(found)
    assert found["MASTER_ADDR"] == "gpu03"
    assert 1024 < int(found["MASTER_PORT"]) < 32768
    chosen = batch | step | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    adopt_srun(chosen)
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    ("machines", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-007,12],cpu1", "gpu003"),
        ("gpu[5,9]-ib", "gpu5-ib"),
        ("rack[1-2]n[04-05]", "rack1n04"),
        ("10.0.0.[2-3]", "10.0.0.2"),
    ],
)
def test_the_first_machine(machines: str, first: str):
    assert first_machine(machines) == first


def test_the_local_rank_of_deepspeed_is_no_setting():
    given = ["--local_rank=3", "--local-rank=3", "run=mine", "--cfg", "job", "--local_rank"]
    assert without_local_rank(given) == ["run=mine", "--cfg", "job", "--local_rank"]


# --- the page ------------------------------------------------------------------------------------


def test_the_script_composes():
    assert re.search(r"--ntasks-per-node=(\d+)\n#SBATCH --gpus-per-node=\1\n", SCRIPT)
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=False).returncode == 0
    for line in re.findall(r"^    (?:STAGE=\w+ )?sbatch .*", GUIDE, re.MULTILINE):
        job("experiment=miniature", "run=mine", *line.split("job.sh")[1].split())


def test_the_page_is_linked():
    for page in ("README.md", "docs/training.md", "docs/scale-out.md"):
        assert "many-machines.md" in (ROOT / page).read_text(), page
