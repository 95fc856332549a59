"""`make gpu-day`: everything worth measuring on one GPU, in order of value, within nine minutes.

If interrupted, rerun the same command; it resumes. `make gpu-day ARGS=--dry` runs every part at
reduced shapes on the CPU. See docs/gpu-day.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_day.wheels import refuse_missing

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.gpu_day.parts import Part
    from benchmarks.gpu_day.runner import Day

WIDTH = 120
"""Columns that the table needs."""
DRY_S = 8.0
"""Seconds of a part of a dry run on two cores, for the estimate of the rest."""


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make gpu-day", description=__doc__)
    add = parser.add_argument
    add("--dry", action="store_true", help="every part at reduced shapes on the CPU")
    add("--minutes", type=float, help="for all parts, the rest is not run; 9, with --dry 30")
    add("--parts", nargs="+", metavar="PART", help="only these; quote names with a space")
    add("--folder", type=Path, help="results, logs and random weights; runs/gpu-day")
    add("--results", type=Path, help="where the page goes; benchmarks/results")
    options = parser.parse_args(words)
    options.folder = options.folder or Path("runs/gpu-day-dry" if options.dry else "runs/gpu-day")
    options.minutes = options.minutes or (30.0 if options.dry else 9.0)
    default = options.folder if options.dry else Path("benchmarks/results")
    options.results = options.results or default
    return options


def chosen(names: Sequence[str] | None) -> "tuple[Part, ...]":
    """The parts to run, in the day's order.

    Raises:
        ValueError: There is no such part.
    """
    from benchmarks.gpu_day.parts import PARTS

    known = [part.name for part in PARTS]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"--parts has {', '.join(unknown)}; the parts are {', '.join(known)}")
    return tuple(part for part in PARTS if names is None or part.name in names)


def facts_of(folder: Path, context: BaseContext, *, dry: bool) -> dict[str, Any]:
    """The machine's facts, from a process that ends, so that this one never takes hold of the GPU.

    Raises:
        ValueError: There is no GPU that torch can use, or torch cannot be imported.
    """
    from benchmarks.gpu_day.machine import write_facts

    path = folder / "machine.json"
    path.unlink(missing_ok=True)
    process = context.Process(  # type: ignore[attr-defined]
        target=write_facts, args=(path,), kwargs={"dry": dry}
    )
    process.start()
    process.join()
    if not path.exists():
        raise ValueError("torch cannot be used here, see the message above; install it again")
    facts: dict[str, Any] = json.loads(path.read_text())
    if facts["device"] is None and not dry:
        raise ValueError(
            "torch sees no GPU on this machine; check the driver with nvidia-smi, or run "
            "`make gpu-day ARGS=--dry`, every part at reduced shapes on the CPU"
        )
    return facts


def main(words: Sequence[str], context: BaseContext | None = None) -> int:
    """Run what is missing; returns 1 if a part failed."""
    options = arguments(words)
    other_versions = refuse_missing()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from benchmarks.gpu_day import report
    from benchmarks.gpu_day.runner import Day

    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, WIDTH))
    parts, context = chosen(options.parts), context or multiprocessing.get_context("spawn")
    facts = facts_of(options.folder, context, dry=options.dry) | {"unmet": other_versions}
    if other_versions:
        console.print(f"[yellow]other versions than pyproject.toml has:[/] {other_versions}")
    day = Day(folder=options.folder, dry=options.dry, facts=facts)
    day.clear_work()
    show_all(console, day, parts, options, context)
    page = report.write(day, parts, options.results)
    console.print(report.table(day, parts))
    console.print(f"page: {page} · logs: {day.folder / 'logs'}", soft_wrap=True, markup=False)
    failed = [part for part in parts if "error" in (day.result(part) or {})]
    return 1 if any(not day.is_finished(part) for part in failed) else 0


def show_all(
    console: "Console",
    day: "Day",
    parts: "Sequence[Part]",
    options: argparse.Namespace,
    context: BaseContext,
) -> None:
    """Run the parts, print a line for each that ends, and keep the page up to date."""
    from benchmarks.gpu_day import report, runner

    limit_s, began = 60 * options.minutes, time.monotonic()
    for part, moment in runner.run(day, parts, limit_s, context):
        if moment == "begins":
            left = [other for other in parts if not day.is_finished(other)]
            expected_s = sum(DRY_S if day.dry else other.expected_s for other in left)
            left_s = min(expected_s, limit_s - (time.monotonic() - began))
            console.print(
                f"{part.name} ({parts.index(part) + 1} of {len(parts)}, about "
                f"{left_s / 60:.0f} min left)", markup=False,
            )  # fmt: skip
            continue
        for line in report.lines(day, [part]):
            text = " · ".join(cell for cell in line.cells[1:] if cell not in ("", "–"))
            console.print(f"  {text}", soft_wrap=True, markup=False)
        report.write(day, parts, options.results)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command, it resumes", file=sys.stderr)
        sys.exit(130)
