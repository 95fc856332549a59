"""Runs the rounds: each stage is an ordinary command, started and waited for as a child process.

A stage that is finished answers at once, so the same command resumes wherever it was interrupted,
and a higher number of rounds continues after the last.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from conf.job import Job, settings
from data.artifacts.atomic import write_json
from data.artifacts.manifest import code_revision
from data.distributed import Rank
from data.pairs import open_pairs
from data.storage.paths import is_same_folder
from evaluate.rounds.plan import Command, PromptBlocks, RoundsPlan
from generate.run import prompts_of

if TYPE_CHECKING:
    from evaluate.rounds.results import RoundResult

OURS = ("run=", "goal=", "rounds.", "pairs@rounds.", "pairs.root=")
"""Beginnings of settings that are this command's own; those of the stages follow from them."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
Start = Callable[[Sequence[str]], int]
"""Starts a command and returns its exit status."""


def main(job: Job, typed: Sequence[str]) -> None:
    """Run the rounds of a job; `typed` are the settings of the command line.

    Raises:
        ValueError: A setting contradicts the rounds; nothing was started.
        SystemExit: A stage failed, with its exit status.
    """
    plan, console = plan_of(job, typed), Console()
    words = launcher_of(job)
    for note in notes(job, plan):
        say(console, note)
    if job.rounds.dry_run:
        for number in range(1, plan.spec.count + 1):
            for command in plan.commands(number):
                say(console, line_of(words, command))
        return
    run_rounds(job, plan, words, start, console)


def launcher_of(job: Job) -> list[str]:
    """The words before a stage's name.

    Raises:
        ValueError: There is no such program.
    """
    words = shlex.split(job.rounds.launcher) or [this_python(), "-m"]
    if shutil.which(words[0]) is None:
        raise ValueError(
            f"rounds.launcher={job.rounds.launcher}: {words[0]} is no program of this machine; "
            "give its path, or leave rounds.launcher out for one process"
        )
    return words


def plan_of(job: Job, typed: Sequence[str]) -> RoundsPlan:
    """The plan of a job's rounds, checked before anything is started.

    Raises:
        ValueError: A setting contradicts the rounds, or the prompts cannot be used.
    """
    check(job)
    spec, model = job.generate.prompts, job.model
    unlimited = replace(job.generate, prompts=replace(spec, max_prompts=0))
    every = prompts_of(replace(job, generate=unlimited))
    return RoundsPlan(
        spec=job.rounds,
        folder=job.folder,
        run=job.run,
        settings=tuple(word for word in typed if not word.startswith(OURS)),
        base=f"{model.path}@{model.revision}" if model.revision else model.path,
        base_name=job.evaluate.base,
        prompts=PromptBlocks(len(every.prompts), spec.max_prompts, spec.skip_prompts),
        first_seed=job.generate.first_seed,
        judged=job.evaluate.folder,
        vote=job.vote.name,
    )


def check(job: Job) -> None:
    """Refuse settings that the rounds decide themselves.

    Raises:
        ValueError: Names the setting.
    """
    if Rank.from_environment().world_size > 1:
        raise ValueError(
            "the rounds are started once, not by a launcher on every process: they start each "
            "stage with rounds.launcher, as rounds.launcher='srun .venv/bin/python -m'"
        )
    if job.pairs.kind != "own" or not is_same_folder(job.pairs.root, job.folder / "pairs"):
        raise ValueError(
            f"the rounds generate their own pairs, but pairs.root={job.pairs.root} "
            f"(pairs.kind={job.pairs.kind}); choose pairs=own, or an experiment that has it, and "
            "mix in other pairs with rounds.mix and rounds.mix_pairs"
        )
    ours = {"generate.models": job.generate.models, "evaluate.models": job.evaluate.models}
    for name, models in ours.items():
        if models:
            raise ValueError(
                f"{name} names {', '.join(models)}, but the rounds choose the models themselves: "
                "the base (model.path) and the policy of each round; leave it out"
            )
    ends = {
        "evaluate.scores_only": job.evaluate.scores_only,
        "label.inspect": job.label.inspect,
        "train.advise": job.train.advise,
    }
    for name, value in ends.items():
        if value:
            raise ValueError(f"{name}=true finishes no round; leave it out")
    _check_start(job)
    if job.rounds.mix_pairs.root:
        open_pairs(job.rounds.mix_pairs)


def _check_start(job: Job) -> None:
    start = job.train.lora.start
    if start is not None and job.rounds.count > 1:
        raise ValueError(
            f"train.lora.start={start} is an adapter of the base, but from round 2 on a round "
            "begins with the policy of the one before, which has it already; merge it into the "
            "base (pipeline.fuse_lora), or leave it out"
        )


def notes(job: Job, plan: RoundsPlan) -> list[str]:
    """What is worth knowing before the first round."""
    lines = plan.prompts.notes(plan.spec.count)
    if plan.spec.stop_when_worse and not job.panel.held_out:
        lines.append("panel.held_out is empty: no judge can stop the rounds")
    if plan.spec.mix and not plan.spec.mix_pairs.root:
        fractions = [plan.mixed_fraction(number) for number in range(1, plan.spec.count + 1)]
        fewer = [f"{x:.2g} of round {n}" for n, x in enumerate(fractions, 1) if x < plan.spec.mix]
        lines.append(f"rounds.mix={plan.spec.mix}: earlier rounds give {', '.join(fewer)}")
    return lines


def run_rounds(
    job: Job, plan: RoundsPlan, words: Sequence[str], start: Start, console: Console
) -> str:
    """Run round after round; return why they stopped early, or ""."""
    from evaluate.rounds.results import read_result, reason_to_stop

    results, stopped = [], ""
    for number in range(1, plan.spec.count + 1):
        for command in plan.commands(number):
            line = line_of(words, command)
            say(console, f"round {number} of {plan.spec.count}: {line}")
            if status := start([*words, command.stage, *command.settings]):
                say(
                    console,
                    f"round {number}, {command.stage} ended with status {status}: see its message "
                    "above; then rerun the same command, it resumes",
                )
                raise SystemExit(status if status > 0 else 128 - status)  # as shells have it
        results.append(read_result(plan, number))
        reason = reason_to_stop(results[-1])
        stopped = reason if plan.spec.stop_when_worse else ""
        report(job, plan, results, stopped, console)
        if reason:
            say(console, f"after round {number}: {reason}")
        if stopped:
            say(console, "stopped; rounds.stop_when_worse=false continues")
            break
    return stopped


def report(
    job: Job, plan: RoundsPlan, results: "Sequence[RoundResult]", stopped: str, console: Console
) -> None:
    """Write `rounds.json` and `rounds.html`, and print the tables."""
    from evaluate.reporting.rounds import print_rounds, write_rounds_report
    from evaluate.rounds.results import images_by_round

    values = [result.as_json() for result in results]
    images = images_by_round(results, plan.base_name, job.evaluate.gallery_pairs, job.seed)
    facts = {"code_revision": code_revision(), "settings": settings(job)}
    write_json(plan.folder / "rounds.json", {"rounds": values, "stopped": stopped, **facts})
    path = write_rounds_report(
        plan.folder, values, images, run=plan.run, count=plan.spec.count, stopped=stopped,
        resolution=job.evaluate.size(job.model.resolution).recorded, settings=facts,
    )  # fmt: skip
    print_rounds(console, values)
    say(console, f"report: {path}")


def start(words: Sequence[str]) -> int:
    """Run a command until it ends; it gets what ends this process, and is waited for."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    with subprocess.Popen(words, env=environment) as child, ending(child):
        return child.wait()


@contextmanager
def ending(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a child together with this process, which Ctrl-C and Slurm's or make's SIGTERM end."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:  # the terminal has sent it to the child, too
        child.wait()
        raise
    except SystemExit:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def this_python() -> str:
    """The interpreter that runs, from here if it lies below: commands are shorter to read."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def line_of(words: Sequence[str], command: Command) -> str:
    """A command as it is typed in a shell."""
    return shlex.join([*words, command.stage, *command.settings])


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
