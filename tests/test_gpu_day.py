"""`make gpu-day`: a dry run of its parts, what it does about failures, and `make gpu-wheels`."""

import json
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from benchmarks.gpu_day import __main__ as program
from benchmarks.gpu_day import report, runner, wheels
from benchmarks.gpu_day.parts import PARTS, Part
from tests.helpers_ranks import context

GROUPS = {
    "one": ("labels", "scoring", "labels compiled"),
    "two": ("sd15", "sd15 floor", "sd15 zero2", "sd15 compile"),
    "three": ("sdxl", "sdxl floor", "sdxl full"),
    "four": ("sdxl channels_last", "sdxl selective", "sdxl sampling"),
    "five": ("win rates",),
    "six": ("tests",),
    "seven": ("sd35", "flux"),
}
"""A part for every function, model and option; `make gpu-day ARGS=--dry` runs all others, too."""


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parts as forks of the server that has imported everything."""
    monkeypatch.setattr(program, "refuse_missing", lambda: ["2.10 for torch>=2.11"])
    return context()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_parts_run_dry(group: str, tmp_path: Path, forks: Any, capsys: pytest.CaptureFixture[str]):
    names = GROUPS[group]
    options = ["--dry", "--folder", str(tmp_path), "--parts", *names]
    status = program.main(options, forks)
    printed = capsys.readouterr().out
    assert status == 0, printed
    page = (tmp_path / "gpu-day-dry.md").read_text()
    figures = json.loads((tmp_path / "gpu-day-dry.json").read_text())["parts"]
    assert set(figures) == set(names)
    for name in names:
        assert f"| {name}" in page
        for row in figures[name]["figures"]["rows"]:
            assert row.get("rate", 1) > 0
    assert "2.10 for torch>=2.11" in page
    assert "failed" not in page
    assert "not run" not in page
    if "sd15" in names:
        assert "of the floor" in page
        assert figures["sd15"]["figures"]["counted_gib"] > 0


def test_the_groups_have_every_function_model_and_option():
    def kind(part: Part) -> set[tuple[str, str]]:
        settings = part.on_gpu
        varied = [*settings.get("options", {}).values(), settings.get("zero", 1)]
        return {(part.function, str(settings.get("world")))} | {("", str(v)) for v in varied}

    tested = [part for part in PARTS if part.name in sum(GROUPS.values(), ())]
    of_tested = set().union(*map(kind, tested)) | {(f"{program.__name__}", "")}
    left = set().union(*map(kind, PARTS)) - of_tested
    assert left == {("benchmarks.gpu_day.judge.sampling", "sd15")}  # as sdxl, with one encoder


# --- the runner, on parts that take no time ------------------------------------------------------


def quick(folder: Path, *, number: int) -> dict[str, Any]:
    return {"rows": [{"rate": number, "unit": "things/s"}]}


def full(folder: Path) -> dict[str, Any]:
    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")


def broken(folder: Path) -> dict[str, Any]:
    raise KeyError("no such thing")


def sleepy(folder: Path) -> dict[str, Any]:
    time.sleep(60)
    return {}


def killed(folder: Path) -> dict[str, Any]:
    import os
    import signal

    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def part(function: Any, limit_s: float = 30, **settings: Any) -> Part:
    return Part(
        name=f"a {function.__name__}", function=f"{__name__}.{function.__name__}", expected_s=1,
        limit_s=limit_s, on_gpu=settings, reduced={},
    )  # fmt: skip


FACTS = {
    "device": "NVIDIA Test 80GB", "device_memory_gib": 80.0, "driver": "1.2", "cuda": "13.0",
    "code": "abc", "commit": "def", "versions": {"torch": "2.11"}, "cores": 2, "date": "2026-01-01",
    "processor": "a CPU", "system": "Linux", "unmet": [],
}  # fmt: skip


def day_in(folder: Path, **facts: Any) -> runner.Day:
    return runner.Day(folder=folder, dry=False, facts=MappingProxyType(FACTS | facts))


@pytest.mark.ranks
@pytest.mark.slow
def test_a_day_goes_on_after_every_kind_of_failure(tmp_path: Path):
    day = day_in(tmp_path)
    parts = [part(full), part(broken), part(sleepy, 0.5), part(killed), part(quick, number=7)]
    ends = [each.name for each, moment in runner.run(day, parts, 60, context()) if moment == "ends"]
    assert ends == [each.name for each in parts]
    notes = [(line.rate, line.notes) for line in report.lines(day, parts)]
    assert notes[0][1].startswith("out of memory: RuntimeError: CUDA out of memory")
    assert notes[1][1] == "failed: KeyError: 'no such thing'"
    assert notes[2][1] == "failed: stopped after 0 s"
    assert notes[3][1] == "failed: its process ended with status -9: last words"
    assert notes[4] == ("7.00 things/s", "")
    assert [day.is_finished(each) for each in parts] == [True, False, False, False, True]
    page = report.write(day, parts, tmp_path)
    assert page.name == "gpu-day-nvidia-test-80gb.md"
    assert "driver 1.2" in page.read_text()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_finished_part_is_kept_and_a_stale_one_measured_again(tmp_path: Path):
    parts = [part(quick, number=1)]

    def run(day: runner.Day, some: list[Part]) -> list[str]:
        return [f"{each.name} {moment}" for each, moment in runner.run(day, some, 60, context())]

    assert run(day_in(tmp_path), parts) == ["a quick begins", "a quick ends"]
    assert run(day_in(tmp_path), parts) == []
    for day, some in (
        (day_in(tmp_path, code="other"), parts),
        (day_in(tmp_path, device="another"), parts),
        (day_in(tmp_path, device="another"), [part(quick, number=2)]),
    ):
        assert day.result(some[0]) is None
        assert len(run(day, some)) == 2


@pytest.mark.ranks
@pytest.mark.slow
def test_what_the_day_has_no_time_for_is_said(tmp_path: Path):
    day, parts = day_in(tmp_path), [part(sleepy), part(quick, number=1)]
    limit_s = runner.LEAST_S + 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "LEAST_S", limit_s - 0.5)
        moments = list(runner.run(day, parts, limit_s, _short(context(), patch)))
    assert [moment for _, moment in moments] == ["begins", "ends"]
    assert [line.notes for line in report.lines(day, parts)] == ["not run: no time was left"] * 2


def _short(of_tests: Any, patch: pytest.MonkeyPatch) -> Any:
    """The day ends 0.5 s after it began, whatever its limit."""
    clock, began = time.monotonic, time.monotonic()
    patch.setattr(runner.time, "monotonic", lambda: began + 25 * (clock() - began))
    return of_tests


def test_work_of_other_code_is_removed(tmp_path: Path):
    weights = tmp_path / "work" / "base" / "weights"
    for code, kept in (("abc", False), ("abc", True), ("other", False)):
        day_in(tmp_path, code=code).clear_work()
        assert weights.exists() == kept
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.touch()


def test_an_unknown_part_is_refused_by_name():
    with pytest.raises(ValueError, match="--parts has nonsense; the parts are tests, labels, sdxl"):
        program.chosen(["sd15", "nonsense"])


# --- wheels --------------------------------------------------------------------------------------


def test_nothing_is_missing_in_the_pinned_environment():
    assert wheels.unmet() == ([], {})
    assert wheels.refuse_missing() == []


def test_what_is_missing_or_too_old_is_named():
    everything = {wheels.canonical(name): number for name, number in wheels.pins().items()}
    lacking = {key: value for key, value in everything.items() if key != "diffusers"}
    absent, others = wheels.unmet(lacking | {"polars": "0.20"})
    assert (absent, others) == (["diffusers>=0.42.1"], {"polars>=1.40": "0.20"})


def test_what_is_missing_is_refused_and_what_is_older_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels, "unmet", lambda: ([], {"polars>=1.40": "0.20"}))
    assert wheels.refuse_missing() == ["0.20 for polars>=1.40"]
    monkeypatch.setattr(wheels, "unmet", lambda: (["diffusers>=0.42.1", "peft>=0.19"], {}))
    with pytest.raises(ValueError, match=r"lacks diffusers>=0.42.1, peft>=0.19.*make gpu-wheels"):
        wheels.refuse_missing()


def test_a_list_of_what_is_there_decides_what_is_gathered(tmp_path: Path):
    path = tmp_path / "present.txt"
    kept = {name: number for name, number in wheels.pins().items() if name != "hydra-core"}
    kept |= {"pillow": "1.0", "torch": "2.0"}
    path.write_text("".join(f"{name}=={number}\n" for name, number in kept.items()))
    pillow = wheels.pins()["pillow"]
    gathered = wheels.to_gather("3.12", wheels.read_present(path))
    assert gathered == ["hydra-core==1.3.8", f"pillow=={pillow}"]  # and no other torch
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"has no line NAME==VERSION; write it with pip list"):
        wheels.read_present(path)


def test_an_image_lacks_what_it_is_said_to_lack():
    names = {pin.partition("==")[0] for pin in wheels.to_gather("3.12", None)}
    lacking = "diffusers deepspeed open-clip-torch polars polars-runtime-32 hydra-core omegaconf"
    assert set(f"{lacking} antlr4-python3-runtime hjson ftfy beartype".split()) <= names
    assert not names & {"torch", "torchvision", "transformers", "numpy", "pyarrow", "scipy"}


def test_a_large_wheel_is_packed_and_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import zipfile

    monkeypatch.setattr(wheels, "PACK_MIB", 0)
    path = tmp_path / "a-1-py3-none-any.whl"
    content = bytes(range(256)) * 400
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a/__init__.py", content)
    wheels.pack(tmp_path)
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("a/__init__.py") == content
        assert wheel.infolist()[0].compress_type == zipfile.ZIP_LZMA
    assert wheels.wheel_of("a==1", tmp_path) == path
