"""The commands of docs/many-machines.md, on one machine that stands for two, and how runs fail."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.artifacts.parquet_io import write_table
from data.distributed import adopt_srun, first_machine, without_local_rank
from tests import as_fork
from tests.helpers_ranks import (
    ROOT,
    free_port,
    launcher_environment,
    run_ranks,
    shared_place,
    start_ranks,
    straight,
    train_main,
)
from tests.test_conf import job
from train.config import TrainSpec
from train.distributed.world import is_communication_error
from train.distributed.world import start as start_world

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
        ("--module", f"--master_port={port} --module"),
    ):  # fmt: skip
        command = command.replace(old, new)
    own = launcher_environment() | {"PORT": str(port)}
    own["PATH"] = f"{stubs}:{own['PATH']}"
    with (stubs / f"{len(list(stubs.iterdir()))}.log").open("w") as log:
        return subprocess.Popen(
            [*shlex.split(command), *place.overrides(name, *TWO)],
            cwd=ROOT, env=os.environ | own, stdout=log, stderr=log,
        )  # fmt: skip


def output_of(stubs: Path) -> str:
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
    assert [program.wait(300) for program in programs] == [0] * len(commands), output_of(stubs)
    assert output_of(stubs).count("trained 6 steps") == 1  # by one process alone
    assert shared_place().weights(name) == expected()


def ranks_of(name: str) -> list[int]:
    """The processes of a run that launchers have started, by their rank."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of others, or ended by now
            words = (folder / "cmdline").read_text().split("\0")
            if words[2:4] == [as_fork.__name__, "train"] and is_of(name, words):
                variables = (folder / "environ").read_text().split("\0")
                (rank,) = [text[5:] for text in variables if text.startswith("RANK=")]
                ranks[int(rank)] = int(folder.name)
    return [ranks[rank] for rank in sorted(ranks)]


def is_of(name: str, words: list[str]) -> bool:
    return {f"run={name}", f"runs={shared_place().root}/runs"} <= set(words)


def until_steps(journal: Path, steps: int, agents: list[subprocess.Popen], stubs: Path) -> None:
    while not journal.exists() or journal.read_bytes().count(b"\n") < steps:
        assert all(agent.poll() is None for agent in agents), output_of(stubs)
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_machine_that_dies_ends_the_others_and_the_run_resumes(stubs: Path):
    """Two agents of torchrun, which share nothing but the network; then two of DeepSpeed's."""
    place, name, port = shared_place(), "two-agents", free_port()
    agents = [start(command, name, stubs, port) for command in (STATIC_0, STATIC_1)]
    until_steps(place.folder(name) / "journal.jsonl", 2, agents, stubs)
    for victim in (ranks_of(name)[1], agents[1].pid):
        os.kill(victim, signal.SIGKILL)
    agents[1].wait(10)
    assert agents[0].wait(60) != 0
    assert re.search(r"error: rank 0 on \S+ lost contact with the others", output_of(stubs))
    assert "rerun the same command, and it resumes" in output_of(stubs)
    assert not place.folder(name).joinpath("pipeline").exists()
    port = free_port()
    again = [start(command, name, stubs, port) for command in (NO_SSH_0, NO_SSH_1)]
    assert [agent.wait(300) for agent in again] == [0, 0], output_of(stubs)
    assert "resuming after step" in output_of(stubs)
    assert place.weights(name) == expected()


# --- what ends one process ends all --------------------------------------------------------------

TORCHRUN = "torchrun --standalone --nproc-per-node=2 -m train"


@pytest.mark.ranks
def test_a_rank_that_is_killed_ends_the_other_under_torchrun(stubs: Path):
    """The agent says which signal it was; the same command resumes to equal bits."""
    place, name = shared_place(), "killed-rank"
    agent = start(TORCHRUN, name, stubs, free_port())
    until_steps(place.folder(name) / "journal.jsonl", 2, [agent], stubs)
    ranks = ranks_of(name)
    os.kill(ranks[-1], signal.SIGKILL)
    assert agent.wait(60) != 0
    assert "Signal 9 (SIGKILL)" in output_of(stubs)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    output = place.train(name, *TWO, world=2)
    assert "resuming after step" in output
    assert place.weights(name) == place.weights(straight(2, 2))


def train_as(overrides: list[str], of_rank_1: list[str]) -> None:
    """A rank of a run; rank 1 is started with other settings."""
    train_main(overrides + (of_rank_1 if os.environ["RANK"] == "1" else []))


def fail_as_two(name: str, *of_rank_1: str) -> tuple[str, str]:
    """What both ranks print when rank 1 has other settings; no launcher ends the first one."""
    place = shared_place()
    place.label(name)
    overrides = place.overrides(name, *TWO, "train.collective_timeout_s=20")
    ranks = start_ranks(place.root / "logs" / name, 2, train_as, overrides, list(of_rank_1))
    for process in reversed(ranks.processes):
        process.join(60)
    assert all(process.exitcode for process in ranks.processes), ranks.output
    first, second = (log.read_text() for log in ranks.logs)
    assert "Traceback" not in first + second
    return first, second


@pytest.mark.ranks
def test_a_rank_that_fails_says_why_and_ends_the_other(tmp_path: Path):
    """A broken image on one machine: both processes end at once, without a launcher's help."""
    broken, place = tmp_path / "pairs", shared_place()
    shutil.copytree(place.root / "pairs", broken)
    for path in broken.glob("*.parquet"):
        table = pq.read_table(path)
        cut = [image[:60] for image in table["jpg_0"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("jpg_0"), "jpg_0", [cut])
        write_table(path, table, row_group_rows=6)
    first, second = fail_as_two("broken", f"pairs.root={broken}")
    assert re.search(r"^error: image 0 of pair .* cannot be read any more", second, re.MULTILINE)
    assert re.search(r"^error: rank 0 on \S+ lost contact with the others", first, re.MULTILINE)
    assert not (place.folder("broken") / "pipeline").exists()
    place.train("broken", *TWO, world=2)
    assert place.weights("broken") == place.weights(straight(2, 2))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        ("train.lr=2e-3", r"rank 0 was started with other settings than rank 1 \(lr: found 0.001"),
        ("runs={elsewhere}", r"/elsewhere/alone on \S+ is another folder than that of rank 0"),
    ],
)
def test_machines_that_are_not_set_up_alike_are_refused(
    of_rank_1: str, message: str, tmp_path: Path
):
    """Rank 0 finds nothing wrong, and would wait for the others."""
    place, elsewhere = shared_place(), tmp_path / "elsewhere"
    place.label("alone")
    shutil.copytree(place.root / "runs" / "alone" / "labels", elsewhere / "alone" / "labels")
    _, second = fail_as_two("alone", of_rank_1.format(elsewhere=elsewhere))
    assert re.search(rf"^error: .*{message}", second, re.MULTILINE)


def waits_for_a_busy_one(given_up: Path) -> None:
    world = start_world("cpu", collective_timeout_s=3.0)
    if world.rank == 1:
        while not given_up.exists():
            time.sleep(0.05)
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)timed? ?out") as caught:
        world.barrier()
    given_up.touch()
    assert is_communication_error(caught.value)


@pytest.mark.ranks
def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(tmp_path: Path):
    run_ranks(tmp_path, 2, waits_for_a_busy_one, tmp_path / "given-up")


# --- what launchers say --------------------------------------------------------------------------


def test_srun_counts_only_inside_a_step_and_after_other_launchers():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "9"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2"}
    for given, rank, world in (
        (batch, None, None),
        (batch | step, "9", "16"),
        (batch | step | torchrun, "1", "2"),
    ):
        variables = dict(given)
        adopt_srun(variables)
        assert (variables.get("RANK"), variables.get("WORLD_SIZE")) == (rank, world)
    variables = batch | step
    adopt_srun(variables)
    assert variables["MASTER_ADDR"] == "gpu03"
    assert 1024 < int(variables["MASTER_PORT"]) < 32768
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


def test_the_page_has_the_default_timeout():
    timeout = f"{TrainSpec().collective_timeout_s:,.0f}".replace(",", " ")
    assert f"`train.collective_timeout_s` ({timeout} s)" in GUIDE


def test_the_page_is_linked():
    for page in ("README.md", "docs/training.md", "docs/scale-out.md"):
        assert "many-machines.md" in (ROOT / page).read_text(), page
