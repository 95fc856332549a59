"""The order of the rooms: an import runs to a room further up in `ROOMS`, never back.

A room is a sub-package, or a module at the top of a stage. Stages meet only on disk: `LEVELS` says
which stage may import which.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {
    "data": {"data"},
    "label": {"data", "label"},
    "train": {"data", "train"},
    "generate": {"data", "generate"},
    "evaluate": {
        "data", "generate", "evaluate", "label.config", "label.metrics", "label.scoring",
    },
    "conf": {"data", "conf", "label.config", "train.config", "generate.config", "evaluate.config"},
}  # fmt: skip
"""Stage -> what its files may import. `__main__` and `run` may import `conf`, too."""

ROOMS = {
    "data": (
        "distributed", "devices", "images", "artifacts", "models", "families", "storage",
        "miniature", "pairs",
    ),
    "label": (
        "config", "metrics", "scoring", "voting", "analysis", "run", "parity", "__main__",
    ),
    "train": (
        "config", "identity", "loader", "models", "distributed", "dpo", "trainer", "export",
        "execute", "run", "__main__",
    ),
    "generate": (
        "config", "prompts", "image_files", "model_process", "pipelines", "sampler", "pair_set",
        "run", "__main__",
    ),
    "evaluate": (
        "config", "statistics", "plan", "judging", "reporting", "steps", "run", "rounds",
        "__main__",
    ),
}  # fmt: skip
"""Stage -> its rooms; each may import those before it."""

MOST_ENTRIES = {"data": 10, "label": 10, "train": 12, "generate": 10, "evaluate": 10}
ONLY_IN = {
    "deepspeed": {"train/distributed/*"},
    "hydra": {"conf/job.py"},
    "diffusers": {
        "data/models/folder.py",
        "data/storage/single_file.py",
        "train/models/components.py",
        "train/models/lora_start.py",
        "train/export/*",
        "generate/pipelines.py",
        "generate/sampler.py",
        "label/scoring/vae_encoder.py",
        "data/miniature/*",
    },
    "peft": {"train/models/lora.py"},
    "PIL": {"data/images.py", "data/miniature/*"},
}
FILES = [path.relative_to(ROOT) for name in STAGES for path in sorted((ROOT / name).rglob("*.py"))]


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Every module or name that a file imports, at any depth of the code."""
    modules = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return modules


def module_of(name: str) -> str | None:
    """The module of ours that an imported name lies in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return None


def room_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def upward(path: Path, root: Path = ROOT) -> list[str]:
    """What a file imports from rooms after its own, and of whole stages (`from data import x`)."""
    stage, order = path.parts[0], ROOMS.get(path.parts[0], ())
    if not order or path.name == "__init__.py" and len(path.parts) == 2:
        return []
    own, wrong = order.index(room_of(path)), []
    for name in imports(path, root):
        parts = name.split(".")
        if parts[0] == stage and len(parts) > 1 and order.index(parts[1]) > own:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_stages_meet_only_on_disk(path: Path):
    allowed = STAGES[path.parts[0]] | (
        {"conf"} if path.name in ("__main__.py", "run.py") else set()
    )
    ours = {name for name in imports(path) if name.split(".")[0] in STAGES}
    assert not {
        name
        for name in ours
        if not any(name == good or name.startswith(f"{good}.") for good in allowed)
        and not any(good.startswith(f"{name}.") for good in allowed)
    }


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rooms_have_an_order(path: Path):
    assert not upward(path), f"{path} imports from rooms that stand after its own"


def test_an_arrow_that_runs_up_is_noticed(tmp_path: Path):
    (tmp_path / "data" / "storage").mkdir(parents=True)
    (tmp_path / "data" / "storage" / "x.py").write_text("def f():\n    import data.pairs.schema\n")
    assert upward(Path("data/storage/x.py"), tmp_path) == ["data.pairs.schema"]


def test_no_file_is_part_of_a_circle():
    """Imports inside functions count: a circle that is lazy is a circle."""
    names = {".".join(path.with_suffix("").parts): path for path in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    arrows = {
        name: {m for raw in imports(path) if (m := module_of(raw)) in names and m != name}
        for name, path in names.items()
    }
    while free := [name for name, to in arrows.items() if not to & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, f"a circle among {sorted(arrows)}"


def test_nobody_imports_a_main():
    for path in [*FILES, *(p.relative_to(ROOT) for p in (ROOT / "benchmarks").rglob("*.py"))]:
        assert not any("__main__" in name.split(".") for name in imports(path)), path


@pytest.mark.parametrize(("stage", "most"), MOST_ENTRIES.items())
def test_a_stage_can_be_taken_in_at_a_glance(stage: str, most: int):
    entries = [path for path in (ROOT / stage).iterdir() if path.name != "__pycache__"]
    assert len(entries) <= most
    packages = [path for path in (ROOT / stage).iterdir() if (path / "__init__.py").is_file()]
    deeper = [p for folder in packages for p in folder.iterdir() if (p / "__init__.py").is_file()]
    assert not deeper, "rooms lie one level deep"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_live_in_one_place(path: Path):
    used = {name.split(".")[0] for name in imports(path)}
    for library, places in ONLY_IN.items():
        if library in used:
            assert any(path.match(place) for place in places), f"{library} in {path}"


@pytest.mark.parametrize("stage", ["generate", "label", "train", "evaluate"])
def test_settings_are_light(stage: str):
    """An all-done run answers at once, so nothing heavy is imported before the done-check."""
    folder = ROOT / stage
    settings = sorted((folder / "config").glob("*.py")) or [folder / "config.py"]
    for path in (folder / "__main__.py", folder / "run.py", *settings):
        tree = ast.parse(path.read_text())
        top = {
            alias.name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
        }
        assert not top & {"torch", "diffusers", "transformers", "deepspeed", "open_clip"}
