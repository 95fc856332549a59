"""The published checkpoints of the rewards on BLIP: names and shapes."""

from typing import Any

HEAD_LAYERS = {"image_reward": (0, 2, 4, 6, 7), "cycle_reward": (0, 2, 4, 6, 8)}


def linear(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_shapes(config: dict[str, Any], reward: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a reward's checkpoint, from BLIP's class attributes."""
    vision, text = config["vision_config"], config["text_config"]
    wide, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    at = "blip.visual_encoder"
    found: dict[str, tuple[int, ...]] = {
        f"{at}.cls_token": (1, 1, wide),
        f"{at}.pos_embed": (1, (vision["image_size"] // patch) ** 2 + 1, wide),
        f"{at}.patch_embed.proj.weight": (wide, 3, patch, patch),
        f"{at}.patch_embed.proj.bias": (wide,),
        **norm(f"{at}.norm", wide),
    }
    for i in range(vision["num_hidden_layers"]):
        found |= norm(f"{at}.blocks.{i}.norm1", wide) | norm(f"{at}.blocks.{i}.norm2", wide)
        found |= linear(f"{at}.blocks.{i}.attn.qkv", wide, 3 * wide)
        found |= linear(f"{at}.blocks.{i}.attn.proj", wide, wide)
        found |= linear(f"{at}.blocks.{i}.mlp.fc1", wide, inner)
        found |= linear(f"{at}.blocks.{i}.mlp.fc2", inner, wide)
    at, width, inner = "blip.text_encoder", text["hidden_size"], text["intermediate_size"]
    found[f"{at}.embeddings.position_ids"] = (1, text["max_position_embeddings"])
    found[f"{at}.embeddings.word_embeddings.weight"] = (text["vocab_size"], width)
    found[f"{at}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], width)
    found |= norm(f"{at}.embeddings.LayerNorm", width)
    for i in range(text["num_hidden_layers"]):
        layer = f"{at}.encoder.layer.{i}"
        for part, keys in (("attention", width), ("crossattention", wide)):
            found |= linear(f"{layer}.{part}.self.query", width, width)
            found |= linear(f"{layer}.{part}.self.key", keys, width)
            found |= linear(f"{layer}.{part}.self.value", keys, width)
            found |= linear(f"{layer}.{part}.output.dense", width, width)
            found |= norm(f"{layer}.{part}.output.LayerNorm", width)
        found |= linear(f"{layer}.intermediate.dense", width, inner)
        found |= linear(f"{layer}.output.dense", inner, width)
        found |= norm(f"{layer}.output.LayerNorm", width)
    found |= linear("blip.vision_proj", wide, 256) | linear("blip.text_proj", width, 256)
    sizes = (width, 1024, 128, 64, 16, 1)
    for number, before, after in zip(HEAD_LAYERS[reward], sizes, sizes[1:], strict=False):
        found |= linear(f"mlp.layers.{number}", before, after)
    return found
