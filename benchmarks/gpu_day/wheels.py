"""`make gpu-wheels`: what an image with torch lacks, gathered for a machine without a network.

Nothing outside the standard library is imported before it is known to be there. Versions are those
of constraints.txt. What the image has stays as it is: dependencies are not resolved again there.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOR_TESTS = ("pytest", "hypothesis", "beartype")
"""What the tests marked gpu need besides the project's own dependencies."""
IN_IMAGES = """
    absl-py accelerate annotated-doc anyio certifi charset-normalizer click contourpy cycler
    einops fonttools grpcio h11 hf-xet huggingface-hub hypothesis idna iniconfig jaxtyping
    kiwisolver markdown markdown-it-py matplotlib mdurl msgpack ninja packaging peft pluggy
    protobuf psutil py-cpuinfo pyarrow pygments pyparsing pytest python-dateutil pyyaml
    regex requests rich safetensors scipy shellingham sortedcontainers tensorboard
    tensorboard-data-server timm tokenizers tqdm transformers typer urllib3 wadler-lindig
    werkzeug zipp
"""
"""Packages that images for deep learning have besides torch; `--present` says otherwise."""
GLIBC = range(17, 40)
"""Minor versions of glibc in the names of wheels."""
LARGE_MIB = 60.0
"""Folders beyond this are awkward to carry, and are packed more tightly."""
PACK_MIB = 10.0
"""Wheels below this size stay as they are."""


# --- what is missing here ------------------------------------------------------------------------


def required() -> list[str]:
    """The project's dependencies as pyproject.toml has them, and the tests'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *FOR_TESTS]


def unmet(installed: Mapping[str, str] | None = None) -> tuple[list[str], dict[str, str]]:
    """Requirements without a package, and those with one of another version, here or in a list.

    The second maps a requirement to the version that is there.
    """
    from packaging.requirements import Requirement

    absent, others = list[str](), dict[str, str]()
    for text in required():
        requirement = Requirement(text)
        present = version_of(requirement.name, installed)
        if present is None:
            absent.append(text)
        elif not requirement.specifier.contains(present, prereleases=True):
            others[text] = present
    return absent, others


def version_of(name: str, installed: Mapping[str, str] | None) -> str | None:
    """The version of a package here, or in a list."""
    if installed is not None:
        return installed.get(canonical(name))
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def refuse_missing() -> list[str]:
    """Refuse to begin where a package is missing; say which are of another version than asked for.

    An image's libraries may be older, and usually work: they are no reason to leave a GPU unused.

    Raises:
        ValueError: Names each that is missing, and says how to bring it.
    """
    try:
        absent, others = unmet()
    except ImportError:
        absent, others = ["packaging"], {}
    if absent:
        raise ValueError(
            f"this Python lacks {', '.join(absent)}. With a network: `make setup`, and leave out "
            "PY. Without: `make gpu-wheels` on a machine that has one gathers them into a folder; "
            "see docs/gpu-day.md"
        )
    return [f"{present} for {text}" for text, present in others.items()]


# --- gathering -----------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: Iterable[str], python: str) -> set[str]:
    """Packages with all that they depend on on Linux, by the metadata of this environment."""
    from packaging.requirements import Requirement

    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    known, waiting = set[str](), [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        for text in metadata.distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(target):
                waiting.append(canonical(requirement.name))
    return known


def pins() -> dict[str, str]:
    """Package -> the version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonical(name): number for name, _, number in (line.partition("==") for line in lines)}


def to_gather(python: str, present: Mapping[str, str] | None) -> list[str]:
    """`name==version` of everything that the image lacks."""
    from packaging.requirements import Requirement

    names = [Requirement(text).name for text in required()]
    wanted = closure(names, python)
    _, others = unmet(present) if present is not None else ([], {})
    too_old = {canonical(Requirement(text).name) for text in others}
    lacking = (wanted - set(IN_IMAGES.split() if present is None else present)) | too_old
    fitted = {"torch", "torchvision"}  # the image's fit its driver
    lacking -= (closure(fitted, python) - too_old) | fitted
    known = pins()
    return sorted(f"{name}=={known[name]}" for name in lacking)


def read_present(path: Path) -> dict[str, str]:
    """The lines of `pip list --format=freeze`.

    Raises:
        ValueError: The file has none.
    """
    lines = [line.split("==") for line in path.read_text().split() if "==" in line]
    if not lines:
        raise ValueError(
            f"{path} has no line NAME==VERSION; write it with pip list --format=freeze"
        )
    return {canonical(name): number for name, number in lines}


def gather(pinned: Sequence[str], folder: Path, python: str, machine: str) -> None:
    """Download or build the wheel of each; those that are there stay.

    Raises:
        ValueError: One has neither a wheel for that machine nor one that fits every machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, pin in enumerate(pinned, start=1):
        print(f"{number} of {len(pinned)}: {pin}", flush=True)
        if not wheel_of(pin, folder):
            fetch(pin, folder, python, machine)
    keep = {path for pin in pinned if (path := wheel_of(pin, folder))}
    for path in set(folder.glob("*.whl")) - keep:
        path.unlink()  # of an earlier list
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pinned))


def wheel_of(pin: str, folder: Path) -> Path | None:
    """The wheel of a pinned package."""
    name, _, number = pin.partition("==")
    for path in folder.glob("*.whl"):
        parts = path.name.split("-")
        if (canonical(parts[0]), parts[1]) == (name, number):
            return path
    return None


def fetch(pin: str, folder: Path, python: str, machine: str) -> None:
    """Download a package's wheel; where there is none, build it without compiling anything."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
    if machine == "x86_64":
        platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    download = [*pip, "download", *target, *platforms, "--no-deps", f"--dest={folder}", pin]
    if subprocess.run(download, capture_output=True, text=True, check=False).returncode == 0:
        return
    build = [*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", pin]
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # DeepSpeed then needs no compiler
    done = subprocess.run(build, env=environment, capture_output=True, text=True, check=False)
    wheel = wheel_of(pin, folder)
    if wheel is None:
        raise ValueError(f"{pin} has no wheel and cannot be built: {done.stderr[-800:]}")
    if not wheel.name.endswith("-none-any.whl"):
        wheel.unlink()
        raise ValueError(
            f"{pin} has no wheel for Python {python} on {machine}; name the machine's Python with "
            "--python, or list what it has with --present"
        )


def size_mib(folder: Path) -> float:
    """The size of all wheels."""
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20


def pack(folder: Path) -> None:
    """Compress large wheels again by LZMA, which pip reads as well: polars is 31 MiB, not 51."""
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            kinds = {entry.compress_type for entry in wheel.infolist()}
            if path.stat().st_size < PACK_MIB * 2**20 or zipfile.ZIP_LZMA in kinds:
                continue
            print(f"packing {path.name}, a few minutes", flush=True)
            partial = path.with_suffix(".partial")
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as packed:
                for entry in wheel.infolist():
                    packed.writestr(entry.filename, wheel.read(entry))
        partial.replace(path)


def main(words: Sequence[str]) -> int:
    """Gather, or say what is missing here."""
    parser = argparse.ArgumentParser(prog="make gpu-wheels", description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("wheels"), help="where the wheels go")
    add("--python", default=f"3.{sys.version_info.minor}", help="that machine's Python, as 3.12")
    add("--machine", default=platform.machine(), help="that machine's processor")
    add("--present", type=Path, help="its packages: the output of pip list --format=freeze")
    add("--check", action="store_true", help="only say what this Python lacks for make gpu-day")
    options = parser.parse_args(words)
    if options.check:
        for line in refuse_missing():
            print(f"another version than pyproject.toml has: {line}")
        print("nothing is missing for make gpu-day")
        return 0
    if not re.fullmatch(r"3\.\d+", options.python):
        raise ValueError(f"--python={options.python}; write it as 3.12")
    present = read_present(options.present) if options.present else None
    gather(to_gather(options.python, present), options.folder, options.python, options.machine)
    if size_mib(options.folder) > LARGE_MIB:
        pack(options.folder)
    print(f"{options.folder}: {size_mib(options.folder):.0f} MiB")
    print("there: python3 -m pip install --no-index --no-deps "
          f"--find-links {options.folder} -r {options.folder}/requirements.txt")  # fmt: skip
    print("and then: make gpu-day PY=python3")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
