"""The design's import rules: data <- label <- evaluate, data <- train, and who may use what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "label", "train", "evaluate", "conf")
ALLOWED = {
    "data": {"data"},
    "label": {"data", "label"},
    "train": {"data", "train"},
    "evaluate": {"data", "evaluate", "label.metrics", "label.config"},
    "conf": {"data", "conf", "label.config", "train.config", "evaluate.config"},
}
ONLY_IN = {
    "deepspeed": {"train/distributed/deepspeed_engine.py"},
    "hydra": {"conf/job.py"},
    "diffusers": {
        "train/models/components.py",
        "train/export/pipeline.py",
        "generate/sampler.py",
        "label/scoring/vae_encoder.py",
        "data/miniature/*",
    },
    "peft": {"train/models/lora.py"},
    "PIL": {"data/images.py", "data/miniature/*"},
}
FILES = [
    path.relative_to(ROOT) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_there_are_files_to_check():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path: Path):
    owner = path.parts[0]
    allowed = ALLOWED[owner] | ({"conf"} if path.name == "__main__.py" else set())
    ours = {name for name in imports(path) if name.split(".")[0] in PACKAGES}
    wrong = {
        name
        for name in ours
        if not any(name == good or name.startswith(f"{good}.") for good in allowed)
        and not any(good.startswith(f"{name}.") for good in allowed)
    }
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_live_in_one_place(path: Path):
    used = {name.split(".")[0] for name in imports(path)}
    for library, places in ONLY_IN.items():
        if library in used:
            assert any(path.match(place) for place in places), f"{library} in {path}"


@pytest.mark.parametrize("package", ["label", "train", "evaluate"])
def test_settings_are_light(package: str):
    """An all-done run answers at once, so nothing heavy is imported before the done-check."""
    for name in ("__main__.py", "config.py"):
        tree = ast.parse((ROOT / package / name).read_text())
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
