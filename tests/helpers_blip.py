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
    result: dict[str, tuple[int, ...]] = {
        f"{at}.cls_token": (1, 1, wide),
        f"{at}.pos_embed": (1, (vision["image_size"] // patch) ** 2 + 1, wide),
        f"{at}.patch_embed.proj.weight": (wide, 3, patch, patch),
        f"{at}.patch_embed.proj.bias": (wide,),
        **norm(f"{at}.norm", wide),
    }
    for i in range(vision["num_hidden_layers"]):
        result |= norm(f"{at}.blocks.{i}.norm1", wide) | norm(f"{at}.blocks.{i}.norm2", wide)
        result |= linear(f"{at}.blocks.{i}.attn.qkv", wide, 3 * wide)
        result |= linear(f"{at}.blocks.{i}.attn.proj", wide, wide)
        result |= linear(f"{at}.blocks.{i}.mlp.fc1", wide, inner)
        result |= linear(f"{at}.blocks.{i}.mlp.fc2", inner, wide)
    at, width, inner = "blip.text_encoder", text["hidden_size"], text["intermediate_size"]
    result[f"{at}.embeddings.position_ids"] = (1, text["max_position_embeddings"])
    result[f"{at}.embeddings.word_embeddings.weight"] = (text["vocab_size"], width)
    result[f"{at}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], width)
    result |= norm(f"{at}.embeddings.LayerNorm", width)
    for i in range(text["num_hidden_layers"]):
        layer = f"{at}.encoder.layer.{i}"
        for part, keys in (("attention", width), ("crossattention", wide)):
            result |= linear(f"{layer}.{part}.self.query", width, width)
            result |= linear(f"{layer}.{part}.self.key", keys, width)
            result |= linear(f"{layer}.{part}.self.value", keys, width)
            result |= linear(f"{layer}.{part}.output.dense", width, width)
            result |= norm(f"{layer}.{part}.output.LayerNorm", width)
        result |= linear(f"{layer}.intermediate.dense", width, inner)
        result |= linear(f"{layer}.output.dense", inner, width)
        result |= norm(f"{layer}.output.LayerNorm", width)
    result |= linear("blip.vision_proj", wide, 256) | linear("blip.text_proj", width, 256)
    sizes = (width, 1024, 128, 64, 16, 1)
    for number, before, after in zip(HEAD_LAYERS[reward], sizes, sizes[1:], strict=False):
        result |= linear(f"mlp.layers.{number}", before, after)
    return result
