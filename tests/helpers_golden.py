"""Networks of reduced size with weights that are a function of their names, and their words.

The golden scores were computed by the official code on these very weights, so nothing here may
change without computing them again; `golden/README.md` says how. The stream is PCG64's raw output,
which NumPy promises never to change.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
PICTURES = sorted((GOLDEN / "pictures").iterdir())
PROMPTS = {
    "short": "a red fox on a snowy hill",
    "cased": "A Cat, two DOGS & 3 birds (4K!); naïve café",
    "long": " ".join(f"a very detailed oil painting of house number {i}" for i in range(20)),
}

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""MPS's words for overall preference."""
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "house", "painting", "fox"]
BERT_WORDS += [start + letter for start in ("", "##") for letter in "bcdefghijklmnopqrstuvwxyz"]
BERT_WORDS += ["##a", *"0123456789&(),!;", *(f"##{digit}" for digit in range(10))]
"""Enough of BERT's vocabulary to read any of the prompts, mostly letter by letter."""

Shapes = Mapping[str, tuple[int, ...]]


def weights(shapes: Shapes) -> dict[str, Tensor]:
    """A state dict in the official names; equal for equal names and shapes, on every machine."""
    return {key: torch.from_numpy(_weight(key, shape)) for key, shape in shapes.items()}


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key.endswith("logit_scale"):
        return np.array(np.log(100), np.float32)
    if key.endswith("position_ids"):
        return np.arange(shape[-1])[None]
    if key.endswith("inv_freq"):  # no weight: 10000^(-2i/d) of d = twice as many dimensions
        return (1 / 10000 ** (np.arange(shape[0]) / shape[0])).astype(np.float32)
    raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw(int(np.prod(shape)))
    unit = ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)  # in [-1, 1)
    if len(shape) == 1:
        is_norm = key.endswith("weight")
        return (is_norm + 0.1 * unit).astype(np.float32)
    if "embed" in key and len(shape) < 4:  # as large as what the layers add, so that words differ
        return unit.astype(np.float32)
    return (unit * 2 / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def shapes_of(model: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def cross_shapes(dim: int, layers: int, heads: int, head_dim: int) -> Shapes:
    """Names and shapes of MPS's own layers, as its checkpoint has them."""
    wide = heads * head_dim
    found: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        across, within = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        found |= {
            f"{across}.norm.weight": (dim,),
            f"{across}.norm.bias": (dim,),
            f"{across}.to_q.weight": (wide, dim),
            f"{across}.to_kv.weight": (2 * head_dim, dim),
            f"{across}.to_out.weight": (dim, wide),
            f"{across}.ff.0.weight": (8 * dim, dim),
            f"{across}.ff.2.weight": (dim, 4 * dim),
            f"{within}.norm.weight": (dim,),
            f"{within}.norm.bias": (dim,),
            f"{within}.rotary_emb.inv_freq": (head_dim // 2,),
            f"{within}.fused_attn_ff_proj.weight": (wide + 2 * head_dim + 8 * dim, dim),
            f"{within}.attn_out.weight": (dim, wide),
            f"{within}.ff_out.1.weight": (dim, 4 * dim),
        }
    return found


def clip_words() -> tuple[list[str], list[tuple[str, str]]]:
    """CLIP's 49408 tokens and 48894 merges, from open_clip's own file."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    return [*words, "<|startoftext|>", "<|endoftext|>"], merges


def save_clip_words(folder: Path) -> None:
    """CLIP's tokenizer as LAION's repository has it: padded with the end token."""
    words, merges = clip_words()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt").write_text(text + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
