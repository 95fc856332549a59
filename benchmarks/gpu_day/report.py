"""The table of the day: on the terminal, as Markdown, and with all figures as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.gpu_day.machine import slug
from benchmarks.gpu_day.parts import Part
from benchmarks.gpu_day.runner import Day
from data.artifacts.atomic import write_bytes, write_json

COLUMNS = ("part", "a second", "of peak", "peak GiB", "counted GiB", "s", "notes")
RIGHT = COLUMNS[1:6]
LONGEST = 300
"""Characters of an error in the table; the log has all of it."""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table as text."""

    part: str
    rate: str = "–"
    of_peak: str = "–"
    peak: str = "–"
    counted: str = "–"
    seconds: str = "–"
    notes: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of `COLUMNS`."""
        return (
            self.part, self.rate, self.of_peak, self.peak, self.counted, self.seconds, self.notes,
        )  # fmt: skip


def lines(day: Day, parts: Sequence[Part]) -> Iterator[Line]:
    """Every part's rows, also of those that failed or were not run."""
    for part in parts:
        result = day.result(part)
        if result is None:
            yield Line(part.name, notes="not run: no time was left")
        elif "error" in result:
            yield Line(part.name, seconds=digits(result["seconds"], 0), notes=failure(result))
        else:
            yield from measured(day, part, result)


def failure(result: Mapping[str, Any]) -> str:
    """Why a part has no figures, in one line."""
    text = " ".join(result["error"].split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"out of memory: {text}" if result["out_of_memory"] else f"failed: {text}"


def measured(day: Day, part: Part, result: Mapping[str, Any]) -> Iterator[Line]:
    """The rows of a part that was measured."""
    seconds = digits(result["seconds"], 0)
    for row in result["figures"]["rows"]:
        rate = row.get("rate")
        notes = row.get("note", "")
        if (floor := floor_of(day, part)) and rate:
            notes = f"{rate / floor:.2f} of the floor; {notes}"
        yield Line(
            part=f"{part.name}: {row['name']}" if "name" in row else part.name,
            rate="–" if rate is None else f"{digits(rate, 2 if rate < 100 else 0)} {row['unit']}",
            of_peak="–" if row.get("peak_fraction") is None else f"{row['peak_fraction']:.1%}",
            peak=digits(row.get("peak_gib"), 1),
            counted=digits(row.get("counted_gib"), 1),
            seconds=seconds,
            notes=notes,
        )
        seconds = ""  # of all rows together


def floor_of(day: Day, part: Part) -> float | None:
    """Pairs a second of the bare passes of a training's model, if they were measured."""
    from benchmarks.gpu_day.parts import PARTS

    shape = part.name.partition(" ")[0]
    floors = [other for other in PARTS if other.name == f"{shape} floor"]
    if not part.function.endswith("training.measure") or not floors:
        return None
    result = day.result(floors[0])
    return float(result["figures"]["pairs_per_s"]) if result and "figures" in result else None


def digits(value: float | None, places: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{places}f}"


def table(day: Day, parts: Sequence[Part]) -> Table:
    """The table on the terminal."""
    shown = Table(title=f"gpu-day on {device_of(day)}")
    for name in COLUMNS:
        shown.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for line in lines(day, parts):
        shown.add_row(*line.cells)
    return shown


def device_of(day: Day) -> str:
    """The device in words."""
    if day.facts["device"] is None or day.dry:
        return f"a CPU at reduced shapes, which says only that it runs ({day.facts['processor']})"
    return str(day.facts["device"])


def markdown(day: Day, parts: Sequence[Part]) -> str:
    """The whole page."""
    facts = day.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    memory = facts["device_memory_gib"]
    gpu = [f"- GPU: {facts['device']}, {memory:.0f} GiB, driver {facts['driver']}, CUDA "
           f"{facts['cuda']}"] if memory else []  # fmt: skip
    head = [
        f"# gpu-day on {device_of(day)}",
        "",
        *gpu,
        f"- machine: {facts['cores']} cores of {facts['processor']}; {facts['system']}",
        f"- versions: {versions}",
        *[f"- another version than pyproject.toml has: {line}" for line in facts["unmet"]],
        f"- code: {facts['commit']} (sources {facts['code']}), {facts['date']}",
        "",
        "Random weights of the published shapes. *Of peak* is the fraction of the device's dense "
        "bf16 peak that went into the model (MFU). *Counted* is the memory that the run's first "
        "line states plus the counted activations.",
        "",
    ]
    rows = ["| " + " | ".join(COLUMNS) + " |"]
    rows.append("|" + "".join("---:|" if name in RIGHT else "---|" for name in COLUMNS))
    cells = [[cell.replace("|", "\\|") for cell in line.cells] for line in lines(day, parts)]
    rows += ["| " + " | ".join(each) + " |" for each in cells]
    return "\n".join([*head, *rows]) + "\n"


def write(day: Day, parts: Sequence[Part], folder: Path) -> Path:
    """Write the page and, beside it, every figure; returns the page's path."""
    name = "dry" if day.dry else slug(str(day.facts["device"]))
    path = folder / f"gpu-day-{name}.md"
    write_bytes(path, markdown(day, parts).encode())
    results = {part.name: day.result(part) for part in parts}
    kept = {name: _without_identity(result) for name, result in results.items() if result}
    write_json(path.with_suffix(".json"), {"machine": dict(day.facts), "parts": kept})
    return path


def _without_identity(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("device", "code",
            "versions", "part")}  # fmt: skip
