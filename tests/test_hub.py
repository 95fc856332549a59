"""Hub ids on a machine without a connection: an answer at once, with the way out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.images import Size
from data.storage import open_store
from data.storage.hub import HubError, cached, fetch, unreachable
from generate.config import PromptsKind, PromptsSpec, Scheduler
from generate.image_files import Model
from generate.model_process import check_hub_model
from generate.prompts.files import located
from label.config import MetricSpec
from label.metrics.registry import resolve
from train.config import ModelSpec
from train.models.base_model import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = Path(__file__).parent.parent / "data" / "miniature" / "weights" / "base"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that nobody answers, with an empty cache; who would wait, fails."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", wait)
    return tmp_path


def model() -> object:
    return find_model(ModelSpec(path="owner/name", revision=COMMIT))


def scorer() -> object:
    return resolve("m", MetricSpec(kind="clip", weights="owner/name", revision=COMMIT))


def prompts() -> object:
    path = "owner/name/prompts.json"
    return located(PromptsSpec(name="x", kind=PromptsKind.table, path=path, revision=COMMIT))


def pairs() -> object:
    hint = "pairs.root=/path takes a folder"
    return open_store("pairs.root", f"hf://datasets/owner/name@{COMMIT}/data", hint)


@pytest.mark.parametrize(
    ("ask", "setting"),
    [(model, "model.path"), (scorer, "metrics.m.weights"), (prompts, "evaluate.prompts.path"),
     (pairs, "pairs.root")],
)  # fmt: skip
def test_the_id_the_reason_and_the_way_out_are_named(ask: Callable[[], object], setting: str):
    with pytest.raises(ValueError, match=setting) as error:
        ask()
    for words in ("owner/name", COMMIT, "127.0.0.1:9 cannot be reached (", f"{setting}=/path"):
        assert words in str(error.value)


def test_what_was_fetched_before_is_used(alone: Path):
    folder = alone / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(BASE / "vae", folder / "vae")  # as stage one leaves it: no whole model
    assert cached("owner/name", COMMIT, ["*"]) == folder
    with pytest.raises(ValueError, match="is not on this machine"):
        model()
    shutil.copytree(
        BASE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert model() == folder


def test_a_model_that_cannot_be_trained_is_told_by_its_configuration(alone: Path):
    """Before any of its weights is fetched."""
    folder = alone / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    described = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(described | {"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(ValueError, match="means flow matching"):
        model()
    judged = Model(name="ours", path="owner/name", revision=COMMIT)
    with pytest.raises(ValueError, match="means flow matching"):
        check_hub_model(judged, Scheduler.ddim, 2, Size(64, 64))
    scheduler.write_text(json.dumps(described))
    check_hub_model(judged, Scheduler.ddim, 2, Size(64, 64))


@pytest.mark.parametrize("path", ["a/b/c", "a b/c", "name"])
def test_what_is_no_hub_id_is_told_before_anything_is_fetched(path: str):
    with pytest.raises(ValueError, match="is neither a folder nor a hub id owner/name; give one"):
        Model(name="ours", path=path, revision=COMMIT).check("give one")


def test_the_switch_of_the_hubs_client_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search("unset the `HF_HUB_OFFLINE`", unreachable())


def test_a_hub_that_says_no_is_quoted_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("404\n\n  no such repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("data.storage.hub.unreachable", lambda: "")
    with pytest.raises(HubError, match="^404 no such repository$"):
        fetch("owner/name", COMMIT, ["*"])
