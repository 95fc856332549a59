"""MPS beyond its official numbers (test_golden.py): batches, refusals, what is computed once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from data.devices import Dtype
from data.miniature import scenes, tokenizer
from label.config import MetricSpec
from label.metrics.architectures import MPS_H
from label.metrics.mps_network import Mps, empty_network, mps_to_ours, visible
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.protocols import CrossMetric
from label.metrics.registry import resolve
from label.metrics.weights import WeightsError
from label.scoring.panel import Panel
from tests import helpers_label as tiny
from tests.helpers_golden import cross_shapes, shapes_of, weights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PROMPTS = scenes.prompts("train")[:6]
CROSS = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "widening": 4}


def official(config: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this size, as published."""
    with torch.device("meta"):
        clip = shapes_of(CLIPModel(CLIPConfig(**config)))
    cross = config["cross_config"]
    sizes = cross["num_layers"], cross["num_heads"], cross["head_dim"]
    results = {f"model.{key}": shape for key, shape in clip.items()}
    results |= cross_shapes(config["projection_dim"], *sizes)
    results["model.text_model.embeddings.position_ids"] = (1, 77)  # a buffer of old checkpoints
    return {prefix + key: shape for key, shape in results.items()}


def small_config() -> dict[str, Any]:
    config = tiny.clip_config()
    return {
        "projection_dim": config.projection_dim,
        "vision_config": config.vision_config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "cross_config": CROSS,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("mps") / "mps", weights(official(small_config())))


def save(folder: Path, state: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_config()))
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer.hf_tokenizer().save_pretrained(folder)
    return folder


def spec(weights: Path, **more: Any) -> MetricSpec:
    given = {"condition": "circle, red, left", "threshold": 0.6} | more
    return MetricSpec(kind="mps", weights=str(weights), **given)


def score(folder: Path, prompts: list[str], batch: int = 8, **more: Any) -> np.ndarray:
    images = [tiny.image(i) for i in range(len(prompts))]
    panel = Panel.load({"mps": spec(folder, **more)}, CPU)
    return panel.score(images, prompts, batch=batch)["mps"]


# --- the checkpoint fits -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "mps."], ids=["official", "hub"])
def test_published_checkpoints_fit_key_for_key(prefix: str) -> None:
    shapes = official(MPS_H, prefix)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    results = {key: tuple(value.shape) for key, value in mps_to_ours(state).items()}
    network = empty_network(MPS_H)
    assert results == shapes_of(network)
    assert network.clip.vision_model.config.num_attention_heads == 16
    layer = network.cross.layers[0]
    assert layer["across"].heads == layer["within"].heads == 16
    count = sum(value.numel() for value in network.state_dict().values())
    assert count == pytest.approx(986.1e6 + 4 * 27.5e6, rel=0.01)


def test_safetensors_from_the_hub_are_the_official_file(root: Path, tmp_path: Path) -> None:
    state = torch.load(root / "pytorch_model.bin", weights_only=True)
    shutil.copytree(root, tmp_path / "hub")
    (tmp_path / "hub" / "pytorch_model.bin").unlink()
    named = {f"mps.{key}": value for key, value in state.items()}
    save_file(named, tmp_path / "hub" / "model.safetensors")
    np.testing.assert_array_equal(score(root, PROMPTS), score(tmp_path / "hub", PROMPTS))


def test_a_folder_that_describes_nothing_is_of_the_published_size(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text("{}")
    resolved = resolve("mps", spec(tmp_path / "hub"))
    assert resolved.transform == ImageTransform(ResizeMode.CROP, 224)
    assert resolved.weights is not None
    assert resolved.weights.config is MPS_H
    with pytest.raises(WeightsError, match=r"does not fit its architecture: missing clip\."):
        Panel.load({"mps": spec(tmp_path / "hub")}, CPU)


# --- scores --------------------------------------------------------------------------------------


def test_who_stands_beside_a_row_changes_nothing(root: Path) -> None:
    alone, together = score(root, PROMPTS, batch=1), score(root, PROMPTS, batch=6)
    assert np.ptp(alone) > 1
    np.testing.assert_allclose(alone, together, atol=2e-4)


def test_the_mask_is_each_prompts_own(root: Path) -> None:
    """The published code divides by the best token of the whole batch."""
    metric = Panel.load({"mps": spec(root)}, CPU).metrics["mps"]
    assert isinstance(metric, Mps)
    together = visible(metric._read(PROMPTS)[0], metric._condition, 0.6)
    requests, _ = metric._network.read(metric._tokens(["circle, red, left"]))
    for row, prompt in enumerate(PROMPTS):
        words, _ = metric._read([prompt])
        assert torch.equal(visible(words, metric._condition, 0.6)[0], together[row])
        best = torch.stack([words[0] @ word for word in requests[0]]).amax(0)
        assert torch.equal(best / best.max() > 0.6, together[row, 0, 0] == 0)
    assert 0 < (together == 0).float().mean() < 1


def test_threshold_and_condition_decide_and_are_recorded(root: Path) -> None:
    base = score(root, PROMPTS)
    for change in ({"threshold": 0.9}, {"condition": "a green square"}):
        assert np.abs(score(root, PROMPTS, **change) - base).max() > 0.01
        assert resolve("m", spec(root, **change)).settings() != resolve("m", spec(root)).settings()
    resolved = resolve("m", spec(root)).settings()
    assert (resolved["condition"], resolved["threshold"]) == ("circle, red, left", 0.6)


def test_each_prompt_of_a_batch_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = Panel.load({"mps": spec(root)}, CPU)
    metric = panel.metrics["mps"]
    assert isinstance(metric, CrossMetric)
    sizes = []
    text = metric._network.clip.text_model.forward
    monkeypatch.setattr(
        metric._network.clip.text_model,
        "forward",
        lambda input_ids: sizes.append(len(input_ids)) or text(input_ids=input_ids),
    )
    images = [tiny.image(i) for i in range(6)]
    panel.score(images, [PROMPTS[i // 3] for i in range(6)], batch=8)
    panel.score(images[:3], [f"prompt {i}" for i in range(3)], batch=8)
    assert sizes == [8, 8]  # a batch of a fixed size for two prompts, and for three
    monkeypatch.setattr("label.metrics.mps_network.PROMPTS", 2)
    panel.score(images, [PROMPTS[i // 3] for i in range(6)], batch=8)
    assert sizes == [8, 8, 2]


def test_bf16_gives_fp32_scores_near_the_fp32_ones(root: Path) -> None:
    full, half = score(root, PROMPTS), score(root, PROMPTS, dtype=Dtype.bf16)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.05 * np.ptp(full) + 1


def test_bad_rows_are_nan(root: Path) -> None:
    panel = Panel.load({"mps": spec(root)}, CPU)
    images = [tiny.image(0), b"<html>", tiny.image(1)]
    scores = panel.score(images, [PROMPTS[0], PROMPTS[0], "  "])["mps"]
    assert np.isnan(scores).tolist() == [False, True, True]


# --- what is refused -----------------------------------------------------------------------------


class Published(nn.Module):
    """As the official file is: a whole module, pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "official", Published())
    with pytest.raises(
        WeightsError, match=r"convert it once.*weights_only=False\)\.state_dict\(\)"
    ):
        Panel.load({"mps": spec(folder)}, CPU)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s.pop("cross_model.layers.1.0.fn.to_q.weight"),
            "missing cross.layers.1.across.q",
        ),
        (lambda s: s.update({"cross_model.extra": torch.zeros(1)}), "unexpected cross.extra"),
        (lambda s: s.update({"model.logit_scale": torch.zeros(2)}), r"logit_scale has shape \(2,"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_checkpoints_are_refused(root: Path, tmp_path: Path, change: Any, says: str) -> None:
    state: dict[str, Tensor] = torch.load(root / "pytorch_model.bin", weights_only=True)
    change(state)
    with pytest.raises(WeightsError, match=f"does not fit its architecture.*{says}"):
        Panel.load({"mps": spec(save(tmp_path / "other", state))}, CPU)


def test_settings_that_make_no_sense(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.mps\.threshold=1\.0; it must be in \[0, 1\)"):
        resolve("mps", spec(root, threshold=1.0))
    with pytest.raises(ValueError, match=r"mps\.condition is empty.*conf/metric/mps\.yaml"):
        resolve("mps", spec(root, condition=" "))
    shutil.copytree(root, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(WeightsError, match="has no tokenizer; it needs tokenizer"):
        resolve("mps", spec(tmp_path / "mute"))
    (tmp_path / "mute" / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(WeightsError, match="describes no MPS; it lacks cross_config, projection_d"):
        resolve("mps", spec(tmp_path / "mute"))
