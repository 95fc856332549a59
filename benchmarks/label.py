"""How fast stage one is, beside what is possible: `make bench-label`.

Prints a table and, on the last line, its figures as one JSON object. Runs that are compared take
turns, and the middle of their ratios counts, because other programs use the machine, too.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any


def machine() -> str:
    """The machine in words."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cpu = names[0] if names else platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}{gpu}"


def table(figures: dict[str, Any], indent: str = "") -> None:
    """Print figures one a line."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            table(value, f"{indent}  ")
        else:
            shown = f"{value:.3f}" if isinstance(value, float) else value
            print(f"{indent}{name:<{28 - len(indent)}} {shown}", flush=True)


def main() -> None:
    """Measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="small inputs: does it run at all?")
    arguments.add_argument("--only", nargs="*", default=[], help="parts to measure, by name")
    arguments.add_argument("--rounds", type=int, default=3, help="turns of what is compared")
    arguments.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.memory:
        from benchmarks.effects import memory_here

        memory_here(given.memory)
        return
    result: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[1]}
    table(result)
    chosen = parts(given.quick, 1 if given.quick else given.rounds)
    for name in given.only or chosen:
        result[name] = chosen[name]()
        table({name: result[name]})
    result["load_at_end"] = os.getloadavg()[1]
    print(json.dumps(result))


def parts(quick: bool, rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured; the quick ones are too small to mean anything."""
    import torch  # here, because worker processes import this file, too

    from benchmarks import inputs
    from benchmarks.effects import memory, precision, reuse
    from benchmarks.pipeline import sized

    big = inputs.TINY if quick else inputs.VIT_B
    pairs = 10 if quick else 128
    chosen: dict[str, Callable[[], dict[str, Any]]] = {
        "model_dominates": lambda: sized(big, 14, 8, rounds, 1),
        "decode_dominates": lambda: sized(inputs.TINY, pairs, 8, rounds, 2),
        "embeddings_an_image": lambda: reuse(3_000 if quick else 300_000),
        "changed_votes": lambda: precision(20 if quick else 300),
        "peak_memory_mb": lambda: {f"{n}_pairs": memory(n) for n in (pairs, 10 * pairs)},
    }
    if quick:
        del chosen["peak_memory_mb"]
    if torch.cuda.is_available():
        chosen["gpu"] = lambda: on_gpu(quick)
    return chosen


def on_gpu(quick: bool) -> dict[str, Any]:
    """The paper's panel at its real sizes, as `make gpu-day` measures it."""
    import tempfile

    from benchmarks.gpu_day import labels
    from benchmarks.gpu_day.parts import part

    settings = part("labels").settings(dry=quick)
    with tempfile.TemporaryDirectory() as name:
        return labels.measure(Path(name), **settings)


if __name__ == "__main__":
    main()
