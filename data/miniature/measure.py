"""Measures the miniature: how well scorers judge, how often they disagree, the room to improve."""

import io
import json
import os
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from data.miniature import scenes
from data.miniature.oracle import attributes, oracle
from data.miniature.pairs import write_pairs
from data.miniature.train_base import encode
from data.miniature.train_scorers import AestheticHead, HfTowers, OpenClipTowers, TwoTowers
from data.miniature.training import to_pixels

QUALITY = "quality.json"
NUM_PAIRS, NUM_CLEAN, NUM_SAMPLES = 1500, 600, 200
SEED = 101
GUIDANCES = (1.0, 1.5, 2.0)
STEPS = 15
VOTERS = ("clip", "aesthetic", "pickscore", "hps")


class Scorers:
    """The scorers of a weights folder, each giving one number per image and prompt."""

    def __init__(self, folder: Path) -> None:
        self._clip = _hf_towers(folder / "clip")
        self._pick = _hf_towers(folder / "pickscore")
        self._hps = _open_clip_towers(folder / "hps")
        self._held_out = _open_clip_towers(folder / "held_out")
        self._head = AestheticHead()
        self._head.load_state_dict(load_file(folder / "aesthetic" / "model.safetensors"))

    @torch.no_grad()
    def __call__(
        self, pixels: NDArray[np.uint8], prompts: list[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Scores of images for their own prompts; cosines, and 1 to 10 for the aesthetic one."""
        parts = [
            self._some(pixels[i : i + 256], prompts[i : i + 256])
            for i in range(0, len(prompts), 256)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _some(
        self, pixels: NDArray[np.uint8], prompts: list[str]
    ) -> dict[str, NDArray[np.float32]]:
        seen = self._clip.images(pixels)
        scores = {
            "clip": (seen * self._clip.texts(prompts)).sum(-1),
            "aesthetic": self._head(seen),
            "pickscore": _cosine(self._pick, pixels, prompts),
            "hps": _cosine(self._hps, pixels, prompts),
            "held_out": _cosine(self._held_out, pixels, prompts),
        }
        return {name: score.numpy() for name, score in scores.items()}


def _hf_towers(folder: Path) -> HfTowers:
    return HfTowers(CLIPModel.from_pretrained(folder, dtype=torch.float32))


def _open_clip_towers(folder: Path) -> OpenClipTowers:
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return OpenClipTowers(model)


def _cosine(towers: TwoTowers, pixels: NDArray[np.uint8], prompts: list[str]) -> torch.Tensor:
    return (towers.images(pixels) * towers.texts(prompts)).sum(-1)


def measure(folder: Path) -> None:
    """Print the figures and write them to quality.json."""
    scorers = Scorers(folder)
    facts = {
        "oracle": _oracle_accuracy(folder),
        "pairs": _pair_agreement(scorers),
        "base": _samples(_base(folder), scorers),
        "flow": _samples(_flow(folder), scorers),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    text = json.dumps(facts, indent=2)
    print(text)
    partial = folder / f".{QUALITY}.{os.getpid()}"
    partial.write_text(text + "\n")
    partial.replace(folder / QUALITY)


def _oracle_accuracy(folder: Path) -> dict[str, Any]:
    """How often the oracle reads attributes right: on clean images and after the autoencoder."""
    rng = np.random.default_rng(SEED)
    every = scenes.all_scenes()
    shown = [every[i] for i in rng.integers(len(every), size=NUM_CLEAN)]
    clean = np.stack([scenes.render(scene, scenes.Look(), rng) for scene in shown])
    vae = AutoencoderKL.from_pretrained(folder / "base" / "vae", dtype=torch.float32)
    with torch.no_grad():
        latents = encode(vae, clean) / vae.config.scaling_factor
        restored = np.concatenate(
            [to_pixels(vae.decode(part).sample) for part in latents.split(64)]
        )
    return {
        "clean": _attribute_means(clean, shown),
        "after_autoencoder": _attribute_means(restored, shown),
        "autoencoder_mean_absolute_error": round(
            float(np.abs(clean.astype(float) - restored).mean()), 2
        ),
    }


def _attribute_means(pixels: NDArray[np.uint8], shown: list[scenes.Scene]) -> dict[str, float]:
    rows = [attributes(image, scene.prompt) for image, scene in zip(pixels, shown, strict=True)]
    return {name: round(float(np.mean([row[name] > 0.5 for row in rows])), 3) for name in rows[0]}


def _pair_agreement(scorers: Scorers) -> dict[str, Any]:
    """On rendered pairs: each scorer's accuracy against oracle and human, and their agreement."""
    sides, prompts, human = read_pairs(NUM_PAIRS, SEED)
    gaps = {
        name: score - scorers(sides[1], prompts)[name]
        for name, score in scorers(sides[0], prompts).items()
    }
    votes = {name: np.sign(gap) for name, gap in gaps.items()}
    truth = np.sign([oracle(a, p) - oracle(b, p) for a, b, p in zip(*sides, prompts, strict=True)])
    decided = human != 0.5
    choice = np.where(human > 0.5, 1, -1)
    return {
        "pairs": len(prompts),
        "accuracy_against_oracle": {n: _rate(v == truth) for n, v in votes.items()},
        "accuracy_against_human": {n: _rate((v == choice)[decided]) for n, v in votes.items()},
        "agreement": {f"{a} {b}": _rate(votes[a] == votes[b]) for a, b in combinations(VOTERS, 2)},
        "agreement_with_held_out": {n: _rate(votes[n] == votes["held_out"]) for n in VOTERS},
        "two_to_two": _rate(np.abs(sum(votes[n] for n in VOTERS)) < 1),
    }


def _rate(hits: NDArray[np.bool_]) -> float:
    return round(float(np.mean(hits)), 3)


def read_pairs(number: int, seed: int) -> tuple[NDArray[np.uint8], list[str], NDArray[np.float64]]:
    """Readable pairs of a fresh pair set: images (side x pair x ...), prompts, human labels."""
    with TemporaryDirectory() as scratch:
        write_pairs(Path(scratch), number, seed, shards=1)
        rows = pq.read_table(next(Path(scratch).glob("*.parquet"))).to_pylist()
    sides, prompts, human = [], [], []
    for row in rows:
        try:
            both = [
                np.asarray(Image.open(io.BytesIO(row[f"jpg_{i}"])).convert("RGB")) for i in (0, 1)
            ]
        except OSError:
            continue
        if row["caption"]:
            sides.append(both)
            prompts.append(row["caption"])
            human.append(row["label_0"])
    return np.stack(sides, axis=1), prompts, np.array(human)


def _base(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder / "base", dtype=torch.float32)


def _flow(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(
        folder / "flow", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )


def _samples(pipeline: DiffusionPipeline, scorers: Scorers) -> dict[str, Any]:
    """Mean oracle and scores of an untrained generator on validation prompts, per guidance."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = scenes.prompts("validation")[:NUM_SAMPLES]
    facts: dict[str, Any] = {"prompts": len(prompts), "steps": STEPS}
    for guidance in GUIDANCES:
        generator = torch.Generator().manual_seed(SEED)
        images = pipeline(
            prompts, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator,
            output_type="np", height=scenes.SIDE, width=scenes.SIDE,
        ).images  # fmt: skip
        pixels = (images * 255).round().astype(np.uint8)
        means = {
            name: round(float(score.mean()), 3) for name, score in scorers(pixels, prompts).items()
        }
        seen = [oracle(p, t) for p, t in zip(pixels, prompts, strict=True)]
        facts[f"guidance_{guidance}"] = {"oracle": round(float(np.mean(seen)), 3)} | means
    return facts
