"""ImageReward and CycleReward against BLIP's forward pass, written out in plain torch."""

import json
import math
import shutil
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BlipTextModel

from data.artifacts.fingerprints import Fingerprints
from data.devices import Dtype
from data.miniature import scenes
from label.config import MetricSpec
from label.metrics.architectures import BLIP_LARGE
from label.metrics.base import ResolvedMetric
from label.metrics.blip import Recipe
from label.metrics.blip_reward import Blip, blip_to_hf, empty_network
from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.metrics.protocols import CrossMetric
from label.metrics.registry import resolve
from label.metrics.weights import WeightsError
from label.scoring.panel import Panel
from tests import helpers_label as tiny
from tests.helpers_blip import HEAD_LAYERS, official_shapes

CPU = torch.device("cpu")
SIDE, HEADS = 32, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += sorted({word for prompt in scenes.prompts("train") for word in prompt.split()} - {"a"})
CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": 8, "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": len(WORDS) + 2, "hidden_size": 24, "encoder_hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "max_position_embeddings": 160, "layer_norm_eps": 1e-12,
    },
}  # fmt: skip
LENGTH = {"image_reward": 35, "cycle_reward": 128}
REWARDS = pytest.mark.parametrize("reward", HEAD_LAYERS)
PROMPTS = scenes.prompts("train")[:4]


# --- the official checkpoint ---------------------------------------------------------------------


def random_checkpoint(reward: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in official_shapes(CONFIG, reward).items():
        scale = 3 / shape[-1] ** 0.5 if key.startswith("mlp") else 0.2
        state[key] = torch.randn(shape, generator=generator) * scale
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(160)[None]
    return state


# --- the official forward pass -------------------------------------------------------------------


class Official:
    """What BLIP and the rewards' heads compute, on a checkpoint under its official names."""

    def __init__(self, state: dict[str, Tensor], reward: str) -> None:
        self.state, self.reward = state, reward

    def score(self, pixels: Tensor, prompt: str) -> float:
        result = self._text(self._tokens(prompt), self._image(pixels))[0]
        numbers = HEAD_LAYERS[self.reward]
        for number in numbers:
            result = self._linear(f"mlp.layers.{number}", result)
            if self.reward == "cycle_reward" and number != numbers[-1]:
                result = functional.gelu(result)
        reward = result.item()
        if self.reward == "image_reward":
            reward = (reward - 0.16717362830052426) / 1.0333394966054072
        return reward

    def _tokens(self, prompt: str) -> list[int]:
        """Without padding: what is hidden by a mask changes nothing."""
        words = prompt.split()[: LENGTH[self.reward] - 2]
        return [WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]

    def _image(self, pixels: Tensor) -> Tensor:
        at = "blip.visual_encoder"
        state = {k.removeprefix(f"{at}."): v for k, v in self.state.items()}
        patches = functional.conv2d(
            pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8
        )
        x = torch.cat([state["cls_token"][0], patches[0].flatten(1).T]) + state["pos_embed"][0]
        for i in range(2):
            normed = self._norm(f"{at}.blocks.{i}.norm1", x, 1e-6)
            q, k, v = self._linear(f"{at}.blocks.{i}.attn.qkv", normed).chunk(3, dim=-1)
            x = x + self._linear(f"{at}.blocks.{i}.attn.proj", attend(q, k, v))
            normed = self._norm(f"{at}.blocks.{i}.norm2", x, 1e-6)
            inner = functional.gelu(self._linear(f"{at}.blocks.{i}.mlp.fc1", normed))
            x = x + self._linear(f"{at}.blocks.{i}.mlp.fc2", inner)
        return self._norm(f"{at}.norm", x, 1e-6)

    def _text(self, tokens: list[int], image: Tensor) -> Tensor:
        at = "blip.text_encoder"
        x = self.state[f"{at}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.state[f"{at}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self._norm(f"{at}.embeddings.LayerNorm", x)
        for i in range(2):
            layer = f"{at}.encoder.layer.{i}"
            x = self._bert_attention(f"{layer}.attention", x, x)
            x = self._bert_attention(f"{layer}.crossattention", x, image)
            inner = functional.gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(
                f"{layer}.output.LayerNorm", self._linear(f"{layer}.output.dense", inner) + x
            )
        return x

    def _bert_attention(self, at: str, x: Tensor, seen: Tensor) -> Tensor:
        result = attend(
            self._linear(f"{at}.self.query", x),
            self._linear(f"{at}.self.key", seen),
            self._linear(f"{at}.self.value", seen),
        )
        return self._norm(f"{at}.output.LayerNorm", self._linear(f"{at}.output.dense", result) + x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * weight + bias


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = []
    for one, other, value in zip(*(x.chunk(HEADS, dim=-1) for x in (q, k, v)), strict=True):
        weights = torch.softmax(one @ other.T / math.sqrt(one.shape[-1]), dim=-1)
        parts.append(weights @ value)
    return torch.cat(parts, dim=-1)


# --- on disk -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("blip")
    (root / "bert").mkdir()
    (root / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    for reward in HEAD_LAYERS:
        save(root / reward, random_checkpoint(reward))
    return root


def save(folder: Path, state: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state, folder / "pytorch_model.bin")


def spec_of(root: Path, reward: str, weights: Path | None = None, **more: Any) -> MetricSpec:
    where = str(weights or root / reward)
    return MetricSpec(kind=reward, weights=where, tokenizer=str(root / "bert"), **more)


def native(seed: int) -> tuple[bytes, Tensor]:
    """An image that need not be resized, and what the vision model is fed of it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return buffer.getvalue(), ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]


def recipe_of(reward: str) -> Recipe:
    recipe = import_module(f"label.metrics.{reward}").RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def score(panel: Panel, prompts: list[str], **more: Any) -> np.ndarray:
    """The first metric's scores of the same image with each prompt."""
    scores = panel.score([native(0)[0]] * len(prompts), prompts, **more)
    return next(iter(scores.values()))


# --- the checkpoint fits -------------------------------------------------------------------------


@REWARDS
def test_published_checkpoints_fit_key_for_key(reward: str) -> None:
    network = empty_network(BLIP_LARGE, recipe_of(reward))
    shapes = official_shapes(BLIP_LARGE, reward)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert len(state) > 600
    results = {key: tuple(value.shape) for key, value in blip_to_hf(state).items()}
    assert results == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert network.vision.post_layernorm.eps == 1e-6
    assert {m.eps for m in network.text.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
    assert network.text.encoder.layer[0].attention.self.num_attention_heads == 12
    assert network.vision.encoder.layers[0].self_attn.num_heads == 16
    assert sum(value.numel() for value in network.state_dict().values()) == pytest.approx(
        447e6, rel=0.02
    )


def test_renaming_loses_and_merges_nothing() -> None:
    state = random_checkpoint("image_reward")
    mapped = blip_to_hf(state)
    left_out = {"blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings.position_ids"}
    kept = [key for key in state if not any(key.startswith(name) for name in left_out)]
    assert len(mapped) == len(kept) == len(state) - 5
    assert all(value is state[key] for key, value in zip(kept, mapped.values(), strict=True))


# --- scores --------------------------------------------------------------------------------------


@REWARDS
def test_scores_equal_the_official_forward(root: Path, reward: str) -> None:
    panel = Panel.load({reward: spec_of(root, reward)}, CPU)
    official = Official(random_checkpoint(reward), reward)
    images = [native(i) for i in range(3)]
    prompts = [*PROMPTS[:2], " ".join("abcdefghij" * 20)]
    scores = panel.score([content for content, _ in images], prompts, batch=2)[reward]
    expected = [
        official.score(pixels, prompt) for (_, pixels), prompt in zip(images, prompts, strict=True)
    ]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_decoders_mask_would_give_other_scores(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = Panel.load({"reward": spec_of(root, "image_reward")}, CPU)
    expected = Official(random_checkpoint("image_reward"), "image_reward").score(
        native(0)[1], PROMPTS[0]
    )
    assert score(panel, PROMPTS[:1])[0] == pytest.approx(expected, abs=1e-4)
    forward = BlipTextModel.forward
    monkeypatch.setattr(
        BlipTextModel,
        "forward",
        lambda self, **given: forward(self, **given | {"is_decoder": True}),
    )
    assert abs(score(panel, PROMPTS[:1])[0] - expected) > 1e-2


@REWARDS
def test_prompts_are_cut_at_the_rewards_own_length(root: Path, reward: str) -> None:
    panel = Panel.load({reward: spec_of(root, reward)}, CPU)
    room = LENGTH[reward] - 2  # [CLS] and [SEP] stand at the ends
    base = ["a"] * room
    full, longer = " ".join(base), " ".join([*base, "b", "c"])
    other_last = " ".join([*base[:-1], "b"])
    result = score(panel, [full, longer, other_last])
    assert result[0] == pytest.approx(result[1], abs=1e-6)
    assert abs(result[0] - result[2]) > 1e-4


def test_upper_case_reads_as_lower_case(root: Path) -> None:
    panel = Panel.load({"reward": spec_of(root, "image_reward")}, CPU)
    result = score(panel, [PROMPTS[0], PROMPTS[0].upper(), PROMPTS[1]])
    assert result[0] == pytest.approx(result[1], abs=1e-6)
    assert result[0] != pytest.approx(result[2], abs=1e-4)


def test_bf16_gives_fp32_scores_near_the_fp32_ones(root: Path) -> None:
    half = spec_of(root, "image_reward", dtype=Dtype.bf16)
    panel = Panel.load({"fp32": spec_of(root, "image_reward"), "bf16": half}, CPU)
    scores = panel.score([native(i)[0] for i in range(4)], PROMPTS)
    assert scores["bf16"].dtype == np.float32
    gap = np.abs(scores["bf16"] - scores["fp32"])
    assert 0 < gap.max() < 0.2 * np.abs(scores["fp32"]).max()


@REWARDS
def test_bad_rows_are_nan_and_batches_change_nothing(root: Path, reward: str) -> None:
    panel = Panel.load({reward: spec_of(root, reward)}, CPU)
    assert isinstance(panel.metrics[reward], CrossMetric)
    images = [native(0)[0], b"<html>", native(1)[0], tiny.image(3, (50, 40)), native(0)[0]]
    prompts = [PROMPTS[0], PROMPTS[0], "  ", PROMPTS[1], PROMPTS[1]]
    one = panel.score(images, prompts, batch=1)[reward]
    many = panel.score(images, prompts, batch=8)[reward]
    assert np.isnan(one).tolist() == [False, True, True, False, False]
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)
    assert len(panel.score([], [])[reward]) == 0


class Counting:
    """A judge that has no memory for more than two rows."""

    def __init__(self) -> None:
        self.resolved = ResolvedMetric(
            "judge", MetricSpec(kind="oracle"), ImageTransform(ResizeMode.NONE)
        )
        self.sizes: list[int] = []

    def judge(self, images: Any, prompts: Any) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        rows = zip(images, prompts, strict=True)
        return torch.tensor([float(image.mean()) + len(prompt) for image, prompt in rows])


def test_distinct_rows_are_judged_once_in_batches_that_halve() -> None:
    judge = Counting()
    images = [tiny.image(i % 3, kind="PNG") for i in range(30)]
    prompts = ["word" * (i % 2) for i in range(30)]
    scores = Panel({"judge": judge}).score(images, prompts, batch=4)["judge"]
    assert judge.sizes == [4, 2, 2, 2]  # six distinct (image, prompt)
    expected = [
        np.asarray(Image.open(BytesIO(image))).mean() + len(prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("blip.visual_encoder.cls_token"), "missing vision.embeddings.class_emb"),
        (lambda s: s.update({"blip.queue": torch.zeros(1)}), "unexpected blip.queue"),
        (lambda s: s.update({"mlp.layers.7.bias": torch.zeros(2)}), r"head.7.bias has shape \(2,"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_checkpoints_are_refused(root: Path, tmp_path: Path, change: Any, says: str) -> None:
    state = random_checkpoint("image_reward")
    change(state)
    save(tmp_path / "other", state)
    spec = spec_of(root, "image_reward", weights=tmp_path / "other")
    with pytest.raises(WeightsError, match=f"does not fit its architecture.*{says}"):
        Panel.load({"reward": spec}, CPU)


def test_one_reward_is_not_taken_for_the_other(root: Path) -> None:
    spec = spec_of(root, "cycle_reward", weights=root / "image_reward")
    with pytest.raises(WeightsError, match=r"missing head\.8\.bias.*unexpected head\.7\.bias"):
        Panel.load({"reward": spec}, CPU)


def test_a_bare_file_is_the_published_size(root: Path) -> None:
    spec = spec_of(root, "image_reward", weights=root / "image_reward" / "pytorch_model.bin")
    assert resolve("reward", spec).transform == ImageTransform(ResizeMode.CROP_EVEN, 224)
    with pytest.raises(WeightsError, match=r"missing .* and \d+ more"):
        Panel.load({"reward": spec}, CPU)


def test_pinned_weights(root: Path) -> None:
    path = root / "image_reward" / "pytorch_model.bin"
    resolve("r", spec_of(root, "image_reward", sha256=Fingerprints()(path))).check_sha256()
    with pytest.raises(WeightsError, match="pinned is 00"):
        Panel.load({"r": spec_of(root, "image_reward", sha256="0" * 64)}, CPU)


def test_tokenizers_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    spec = spec_of(root, "image_reward")
    for tokenizer, says in [
        ("", r"metrics\.r\.tokenizer=\(empty\): no such folder"),
        ("google-bert/bert-base-uncased", r"40-digit commit in metrics\.r\.tokenizer_revision"),
        (str(tmp_path), r"has no tokenizer; it needs tokenizer\.json, or vocab\.txt$"),
    ]:
        spec.tokenizer = tokenizer
        with pytest.raises(WeightsError, match=says):
            resolve("r", spec)
    more = [*WORDS, *(f"{word}x" for word in WORDS)]
    (tmp_path / "vocab.txt").write_text("\n".join(more))
    with pytest.raises(WeightsError, match=f"has {len(more)} words, but the weights know"):
        Panel.load({"r": spec}, CPU)


def test_a_folder_without_blips_description_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "image_reward", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(WeightsError, match="describes no BLIP; it needs vision_config and text"):
        resolve("r", spec_of(root, "image_reward", weights=tmp_path / "other"))


def test_tokenizer_is_part_of_the_settings(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "bert", tmp_path / "bert")
    with (tmp_path / "bert" / "vocab.txt").open("a") as file:
        file.write("\nzebra")
    other = spec_of(root, "image_reward")
    other.tokenizer = str(tmp_path / "bert")
    resolved = resolve("r", spec_of(root, "image_reward")).settings()
    assert resolved["weights"].keys() == {"pytorch_model.bin", "config.json", "vocab.txt"}
    assert resolved != resolve("r", other).settings()
    assert isinstance(Panel.load({"r": other}, CPU).metrics["r"], Blip)
