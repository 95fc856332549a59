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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
IMAGES = sorted((GOLDEN / "images").iterdir())
PROMPTS = {
    "short": "a red fox on a snowy hill",
    "cased": "A Cat, two DOGS & 3 birds (4K!); naïve café",
    "typed": "It’s a “small” café &amp; bar, ﬁne light",
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
    results: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        across, within = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        results |= {
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
    return results


def save(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A checkpoint as users have it: the tensors beside their description."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")


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


QWEN_CONFIG: dict[str, Any] = {
    "vision_config": {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4,
        "hidden_act": "quick_gelu", "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text_config": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3],
        },
    },
}  # fmt: skip
QWEN_MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>",
)  # fmt: skip
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTION = "\nHow well does the picture show this?\nPrompt - {text_prompt}\n\n\n"
SCORED = "\nOverall: <|Reward|>\n\nEND\n"
"""Stand-ins for the published instruction, which is not ours to copy."""


def save_qwen_words(folder: Path) -> int:
    """A tokenizer like Qwen2's that reads single bytes; its tokens, the reward's included."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {
        str(len(letters) + i): {"content": mark, "special": True, "normalized": False,
                                "lstrip": False, "rstrip": False, "single_word": False}
        for i, mark in enumerate(QWEN_MARKS)
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": marks,
        "chat_template": QWEN_CHAT, "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "unk_token": None, "bos_token": None, "errors": "replace", "model_max_length": 32768,
        "additional_special_tokens": list(QWEN_MARKS[1:]),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(letters) + len(QWEN_MARKS) + 1


def hps_v3_shapes(config: Mapping[str, Any], words: int) -> Shapes:
    """Names and shapes of HPSv3's checkpoint."""
    vision, text = config["vision_config"], config["text_config"]
    deep, wide, merged = vision["embed_dim"], text["hidden_size"], 4 * vision["embed_dim"]
    per_head = wide // text["num_attention_heads"]
    keys, inner = per_head * text["num_key_value_heads"], text["intermediate_size"]

    def linear(name: str, before: int, after: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        result: dict[str, tuple[int, ...]] = {f"{name}.weight": (after, before)}
        return result | ({f"{name}.bias": (after,)} if bias else {})

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (deep,), f"{name}.bias": (deep,)}

    result: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (deep, 3, 2, 14, 14)}
    for i in range(vision["depth"]):
        at = f"visual.blocks.{i}"
        result |= norm(f"{at}.norm1") | norm(f"{at}.norm2")
        result |= linear(f"{at}.attn.qkv", deep, 3 * deep) | linear(f"{at}.attn.proj", deep, deep)
        result |= linear(f"{at}.mlp.fc1", deep, 4 * deep) | linear(f"{at}.mlp.fc2", 4 * deep, deep)
    result |= norm("visual.merger.ln_q") | linear("visual.merger.mlp.0", merged, merged)
    result |= linear("visual.merger.mlp.2", merged, wide)
    result |= {"model.embed_tokens.weight": (words, wide), "model.norm.weight": (wide,)}
    for i in range(text["num_hidden_layers"]):
        at = f"model.layers.{i}"
        result |= linear(f"{at}.self_attn.q_proj", wide, wide)
        result |= linear(f"{at}.self_attn.k_proj", wide, keys)
        result |= linear(f"{at}.self_attn.v_proj", wide, keys)
        result |= linear(f"{at}.self_attn.o_proj", wide, wide, bias=False)
        result |= linear(f"{at}.mlp.gate_proj", wide, inner, bias=False)
        result |= linear(f"{at}.mlp.up_proj", wide, inner, bias=False)
        result |= linear(f"{at}.mlp.down_proj", inner, wide, bias=False)
        result |= {f"{at}.input_layernorm.weight": (wide,)}
        result |= {f"{at}.post_attention_layernorm.weight": (wide,)}
    result |= linear("lm_head", wide, words, bias=False)
    return (
        result
        | linear("rm_head.0", wide, 1024)
        | linear("rm_head.3", 1024, 16)
        | linear("rm_head.5", 16, 2)
    )
