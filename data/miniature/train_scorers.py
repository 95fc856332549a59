"""Trains the miniature's scorers: a CLIP, an aesthetic head on it, a PickScore and an HPS.

Each has the class, the file layout and the preprocessing of its full-size model, and a taste of
its own, so that they disagree about as often as the real ones do.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from data.miniature import scenes
from data.miniature.taste import Taste
from data.miniature.tokenizer import CONTEXT, hf_tokenizer
from data.miniature.training import Corpus, Plan, captioned, fit, to_signed

EMBEDDING = 64
"""Length of image and text embeddings."""
_WIDTH, _HEADS = 64, 4
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@runtime_checkable
class TwoTowers(Protocol):
    """A model that puts images and texts into one space."""

    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Unit embeddings of images (n x 64)."""

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts (n x 64)."""

    def scale(self) -> Tensor:
        """What the cosine is multiplied by; above 0."""


def normalised(pixels: NDArray[np.uint8]) -> Tensor:
    """Images of the model's own size, as CLIP's preprocessing leaves them."""
    return ((to_signed(pixels) + 1) / 2 - _MEAN) / _STD


class HfTowers:
    """A Hugging Face `CLIPModel`."""

    def __init__(self, model: CLIPModel) -> None:
        self.model = model
        self._tokenizer = hf_tokenizer()

    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Unit embeddings of images."""
        return functional.normalize(
            self.model.get_image_features(normalised(pixels)).pooler_output, dim=-1
        )

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts."""
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        )
        return functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def scale(self) -> Tensor:
        """exp(logit_scale)."""
        return torch.exp(self.model.logit_scale)


class OpenClipTowers:
    """An open_clip `CLIP`."""

    def __init__(self, model: open_clip.CLIP) -> None:
        self.model = model
        self._tokenizer = hf_tokenizer()

    def images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Unit embeddings of images."""
        embeddings: Tensor = self.model.encode_image(normalised(pixels), normalize=True)
        return embeddings

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts; what follows the end token does not matter."""
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        )
        embeddings: Tensor = self.model.encode_text(tokens.input_ids, normalize=True)
        return embeddings

    def scale(self) -> Tensor:
        """exp(logit_scale)."""
        return torch.exp(self.model.logit_scale)


def new_hf_clip() -> CLIPModel:
    """A `CLIPModel` with random weights."""
    tokenizer = hf_tokenizer()
    common = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_attention_heads": _HEADS,
              "projection_dim": EMBEDDING, "hidden_act": "quick_gelu"}  # fmt: skip
    text = common | {
        "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = common | {"num_hidden_layers": 3, "image_size": scenes.SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))


def open_clip_config(width: int = _WIDTH, layers: int = 3) -> dict[str, Any]:
    """The model part of `open_clip_config.json`; `layers` are those of the image tower."""
    return {
        "embed_dim": EMBEDDING,
        "vision_cfg": {"layers": layers, "width": width, "head_width": width // _HEADS,
                       "patch_size": 8, "image_size": scenes.SIDE},
        "text_cfg": {"layers": 2, "width": width, "heads": _HEADS, "context_length": CONTEXT,
                     "vocab_size": len(hf_tokenizer())},
    }  # fmt: skip


def _contrast(towers: TwoTowers, pixels: NDArray[np.uint8], prompts: list[str]) -> Tensor:
    """CLIP's loss: each image finds its prompt in the batch, and each prompt its image."""
    logits = towers.scale() * towers.images(pixels) @ towers.texts(prompts).T
    truth = torch.arange(len(prompts))
    return (functional.cross_entropy(logits, truth) + functional.cross_entropy(logits.T, truth)) / 2


def train_clip(plan: Plan, num_images: int, seed: int) -> CLIPModel:
    """Learn what well-made images show, and nothing about how they look."""
    corpus = captioned(num_images, seed, fault_rate=0.0, quality=(0.6, 1.0))
    torch.manual_seed(seed)
    model = new_hf_clip()
    towers = HfTowers(model)

    def loss_of(indices: Tensor) -> Tensor:
        return _contrast(towers, *_take(corpus, indices))

    fit("clip", [model], loss_of, num_images, plan)
    return model


def _take(corpus: Corpus, indices: Tensor) -> tuple[NDArray[np.uint8], list[str]]:
    return corpus.pixels[indices.numpy()], [corpus.prompts[i] for i in indices.tolist()]


@dataclass(frozen=True, slots=True)
class Choices:
    """Pairs of images of one prompt, the one a judge preferred first."""

    winners: Corpus
    losers: Corpus


def choose(number: int, taste: Taste, seed: int) -> Choices:
    """Show a judge pairs of imperfect images on training prompts, and note what it prefers."""
    rng = np.random.default_rng(seed)
    texts = scenes.prompts("train")
    prompts = [texts[i] for i in rng.integers(len(texts), size=number)]
    sides = np.empty((2, number, scenes.SIDE, scenes.SIDE, 3), np.uint8)
    for i, prompt in enumerate(prompts):
        first, second = scenes.imagine(prompt, rng), scenes.imagine(prompt, rng)
        gap = taste.pleasure(first, prompt) - taste.pleasure(second, prompt)
        won = taste.prefers_first(gap, rng)
        sides[:, i] = (first.pixels, second.pixels) if won else (second.pixels, first.pixels)
    return Choices(Corpus(sides[0], prompts), Corpus(sides[1], prompts))


def train_on_choices(
    name: str, towers: TwoTowers, model: nn.Module, choices: Choices, plan: Plan, contrast: float
) -> None:
    """Learn a judge's choices: winners score above losers (PickScore's loss, hard labels).

    `contrast` weighs CLIP's own loss on the winners, which teaches what the words mean.
    """

    def loss_of(indices: Tensor) -> Tensor:
        winners, prompts = _take(choices.winners, indices)
        losers, _ = _take(choices.losers, indices)
        images = towers.images(np.concatenate([winners, losers]))
        texts = towers.texts(prompts)
        scores = towers.scale() * (images * texts.repeat(2, 1)).sum(-1)
        won, lost = scores.chunk(2)
        loss = -functional.logsigmoid(won - lost).mean()
        if contrast > 0:
            logits = towers.scale() * images[: len(prompts)] @ texts.T
            truth = torch.arange(len(prompts))
            sides = functional.cross_entropy(logits, truth) + functional.cross_entropy(
                logits.T, truth
            )
            loss = loss + contrast * sides / 2
        return loss

    fit(name, [model], loss_of, len(choices.winners.prompts), plan)


class AestheticHead(nn.Module):
    """LAION's aesthetic head v2: linear layers without activations, in the end one dot product."""

    def __init__(self) -> None:
        super().__init__()
        widths = (EMBEDDING, 128, 64, 32, 16, 1)
        places = (0, 2, 4, 6, 7)  # the dropouts between them have no weights
        self.layers = nn.Sequential(*(nn.Identity() for _ in range(8)))
        for place, wide, narrow in zip(places, widths, widths[1:], strict=False):
            self.layers[place] = nn.Linear(wide, narrow)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score of unit image embeddings (n x 64), about 1 to 10."""
        scores: Tensor = self.layers(embeddings).squeeze(-1)
        return scores


def train_aesthetic(model: CLIPModel, plan: Plan, num_images: int, seed: int) -> AestheticHead:
    """Learn the appeal of looks, spread over 1 to 10, from what the CLIP happens to keep of it."""
    rng = np.random.default_rng(seed)
    texts = scenes.prompts("train")
    images = [scenes.imagine(texts[int(rng.integers(len(texts)))], rng) for _ in range(num_images)]
    truth = torch.tensor([1 + 9 * image.look.appeal for image in images])
    pixels = np.stack([image.pixels for image in images])
    with torch.no_grad():
        towers = HfTowers(model)
        parts = [towers.images(pixels[i : i + 256]) for i in range(0, num_images, 256)]
    embeddings = torch.cat(parts)
    torch.manual_seed(seed)
    head = AestheticHead()

    def loss_of(indices: Tensor) -> Tensor:
        return functional.mse_loss(head(embeddings[indices]), truth[indices])

    fit("aesthetic", [head], loss_of, num_images, plan)
    return head
