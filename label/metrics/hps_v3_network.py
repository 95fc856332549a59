"""The network of HPSv3 (Ma et al. 2025): Qwen2-VL-7B reads the image and an instruction.

The prompt is part of the instruction. A head turns the last hidden state of a special token at the
end into mean and spread of a score; the mean is the score. As in the published code, all tokens are
counted in one line: Qwen2-VL's positions for the rows and columns of an image are not used.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.artifacts.readable import check_readable
from data.models.tokenizer import load_tokenizer
from label.metrics.base import CLIP_MEAN, CLIP_STD, ResolvedMetric
from label.metrics.preprocessing import CELL
from label.metrics.state_dict import check_state, read_state
from label.metrics.weights import Weights, WeightsError, read_config

REWARD, IMAGE, PROMPT = "<|Reward|>", "<|image_pad|>", "{text_prompt}"


class HpsV3:
    """The mean of the preference that the network predicts."""

    def __init__(self, resolved: ResolvedMetric, device: torch.device) -> None:
        assert resolved.weights is not None
        self.resolved = resolved
        self._device, self._dtype = device, resolved.dtype.torch
        self._template = read_template(resolved.name, resolved.files["template"])
        self._tokenizer = _tokenizer(resolved.name, resolved.weights)
        self._network = _load(resolved.weights, len(self._tokenizer), self._dtype).to(device)

    @torch.inference_mode()
    def judge(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores one to one, in fp32; NaN where there is nothing to read.

        That is an empty prompt, one that has the tokenizer's own marks in it, and an image that is
        too long for AREA. One row at a time: its 800 tokens occupy a GPU, and its score
        depends on no padding and on no neighbour.
        """
        marks = self._tokenizer.get_added_vocab()
        scores = torch.full((len(prompts),), math.nan)
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            if image.size and prompt.strip() and not any(mark in prompt for mark in marks):
                scores[row] = self._score(image, prompt)
        return scores

    def _score(self, image: np.ndarray, prompt: str) -> Float[Tensor, ""]:
        cells = image.shape[0] * image.shape[1] // CELL**2
        tokens = self._tokenizer(self._text(prompt, cells), return_tensors="pt").input_ids
        grid = [1, image.shape[0] // (CELL // 2), image.shape[1] // (CELL // 2)]
        image_id, reward_id = self._tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
        score: Tensor = self._network(
            to_patches(image).to(self._device, self._dtype),
            torch.tensor([grid], device=self._device),
            tokens.to(self._device),
            (tokens == image_id).to(self._device),
            (tokens == reward_id).to(self._device),
        )
        return score

    def _text(self, prompt: str, cells: int) -> str:
        """The whole conversation, with as many marks as the image has tokens."""
        content = [
            {"type": "image"},
            {"type": "text", "text": self._template.replace(PROMPT, prompt)},
        ]
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text.replace(IMAGE, IMAGE * cells)


class HpsV3Network(nn.Module):
    """Patches and tokens -> the mean of the preference."""

    def __init__(self, qwen: Any, width: int) -> None:
        super().__init__()
        self.qwen = qwen
        self.head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05),
            nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2),
        )  # fmt: skip

    def forward(
        self,
        patches: Float[Tensor, "patch values"],
        grid: Int[Tensor, "1 3"],
        tokens: Int[Tensor, "1 token"],
        is_image: Bool[Tensor, "1 token"],
        is_reward: Bool[Tensor, "1 token"],
    ) -> Float[Tensor, ""]:
        """`is_image` and `is_reward` say what a token stands for; the head works in fp32."""
        seen = self.qwen.visual(patches, grid_thw=grid).pooler_output
        words = self.qwen.language_model.embed_tokens(tokens)
        words = words.masked_scatter(is_image[..., None], seen.to(words.dtype))
        read = self.qwen.language_model(inputs_embeds=words, use_cache=False).last_hidden_state
        prediction: Tensor = self.head(read[is_reward].float())
        return prediction[0, 0]


def to_patches(image: np.ndarray) -> Float[Tensor, "patch values"]:
    """An image (height, width, 3) as Qwen2-VL's patches, four neighbours after each other.

    Each holds the image twice, because the network reads films of two frames and more.
    """
    half, (tall, wide) = CELL // 2, (length // CELL for length in image.shape[:2])
    scaled = image.astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))
    pixels = torch.from_numpy((scaled - mean) / std)
    patches = pixels.reshape(tall, 2, half, wide, 2, half, 3).permute(0, 3, 1, 4, 6, 2, 5)
    patches = patches.reshape(tall * wide * 4, 3, 1, half, half).expand(-1, -1, 2, -1, -1)
    return patches.reshape(tall * wide * 4, -1)


# --- loading -------------------------------------------------------------------------------------


def read_template(name: str, path: Path) -> str:
    """The instruction with `{text_prompt}` in it, up to the mark that is scored.

    From a text file, or from `hpsv3/dataset/data_collator_qwen.py` of the official code, whose
    strings are read and whose code is not run.

    Raises:
        WeightsError: The prompt's or the reward's place is not in it exactly once.
    """
    try:
        check_readable(path, f"metrics.{name}.template")
        text = path.read_text(encoding="utf-8")
        parsed = ast.parse(text).body if path.suffix == ".py" else []
    except (OSError, ValueError, SyntaxError) as error:
        raise WeightsError(f"metrics.{name}.template={path} cannot be read: {error}") from error
    if path.suffix == ".py":
        strings = {
            target.id: node.value.value
            for node in parsed
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        text = strings.get("INSTRUCTION", "") + strings.get("prompt_with_special_token", "")
    if text.count(PROMPT) != 1 or text.count(REWARD) != 1:
        raise WeightsError(
            f"metrics.{name}.template={path} must have {PROMPT} and {REWARD} in it once; the "
            "published one is in hpsv3/dataset/data_collator_qwen.py of MizzenAI/HPSv3"
        )
    return text


def hps_v3_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under `HpsV3Network`'s names; unknown ones keep theirs.

    What would continue the text (`lm_head`) is left out.
    """
    places = {"visual.": "qwen.visual.", "model.": "qwen.language_model.", "rm_head.": "head."}
    renamed = {}
    for key, value in state.items():
        start = key[: key.index(".") + 1] if "." in key else key
        if start != "lm_head.":
            renamed[places.get(start, start) + key.removeprefix(start)] = value
    return renamed


def empty_network(config: Mapping[str, Any], words: int) -> HpsV3Network:
    """The network without memory for its weights: names and shapes."""
    from transformers import Qwen2VLModel

    described = _described(config, words)
    with torch.device("meta"):
        return HpsV3Network(Qwen2VLModel(described), described.text_config.hidden_size)


def _described(config: Mapping[str, Any], words: int) -> Any:
    from transformers import Qwen2VLConfig

    text = {"vocab_size": words, "bos_token_id": None, "eos_token_id": None} | config["text_config"]
    return Qwen2VLConfig(text_config=text, vision_config=dict(config["vision_config"]))


def _load(weights: Weights, words: int, dtype: torch.dtype) -> HpsV3Network:
    """The network with its weights on the CPU; the head in fp32.

    Raises:
        WeightsError: The checkpoint is damaged, not of HPSv3, or of another tokenizer.
    """
    from transformers import Qwen2VLModel
    from transformers.utils import logging

    state = hps_v3_to_ours(read_state(weights.tensors))
    check_state(weights.tensors, state, empty_network(weights.config, words).state_dict())
    described = _described(weights.config, words)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    qwen = Qwen2VLModel.from_pretrained(
        None, config=described, state_dict=_below("qwen.", state), dtype=dtype
    )
    network = HpsV3Network(qwen, described.text_config.hidden_size)
    network.head.load_state_dict(_below("head.", state))
    network.head.float()
    return network.eval().requires_grad_(False)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _tokenizer(name: str, weights: Weights) -> Any:
    """Qwen2-VL's tokenizer, which learns the mark that is scored.

    Raises:
        WeightsError: It does not know how Qwen2-VL talks.
    """
    from transformers import Qwen2Tokenizer

    folder = weights.words[0].parent
    tokenizer = load_tokenizer(Qwen2Tokenizer, folder, f"metrics.{name}.tokenizer")
    separate = folder / "chat_template.json"
    if separate.is_file():
        tokenizer.chat_template = read_config(name, separate).get("chat_template")
    if tokenizer.chat_template is None or IMAGE not in tokenizer.get_vocab():
        raise WeightsError(
            f"metrics.{name}.tokenizer: {folder} has no chat template or no {IMAGE}; HPSv3 reads "
            "with the tokenizer of Qwen/Qwen2-VL-7B-Instruct"
        )
    tokenizer.add_tokens([REWARD], special_tokens=True)
    return tokenizer
