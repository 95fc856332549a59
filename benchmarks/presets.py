"""What fits on one GPU of 12, 24, 48 or 80 GB: `python -m benchmarks.presets` prints the table.

Counted from the files in `conf/preset/`: what a process holds (`train/models/memory.py`), and the
activations that it keeps for the backward pass (`benchmarks/activations.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.activations import COUNTED
from train.config import (
    ActivationCheckpointing,
    LoraSpec,
    OptimizerKind,
    OptimizerSpec,
    Quantize,
    TrainSpec,
)
from train.config.model import USUAL_RANK
from train.models.memory import FP32_VAES, GIB, estimate_memory, published

FOLDER = Path("conf/preset")
MODELS = {
    "sd15": ("SD1.5", "SD1.5 at 512"),
    "sd21_512": ("SD2.1", "SD1.5 at 512"),
    "sd21": ("SD2.1", "SD2.1 at 768"),
    "sdxl": ("SDXL", "SDXL at 1024"),
    "sd35_medium": ("SD3.5 medium", "SD3.5 medium at 1024"),
    "sd35_large": ("SD3.5 large", "SD3.5 large at 1024, LoRA of rank 16"),
    "flux_dev": ("FLUX.1 dev", "FLUX.1 dev at 1024, LoRA of rank 32"),
    "z_image": ("Z-Image", "Z-Image at 1024, LoRA of rank 32"),
    "sana": ("Sana 1.6B", "Sana 1.6B at 1024, LoRA of rank 128"),
    "qwen_image": ("Qwen-Image", "Qwen-Image at 1024, LoRA of rank 32"),
}
"""Choice of `model=` -> its counts, and its activations."""
SIZES = (12, 24, 48, 80)
USABLE = 0.85
"""Fraction of a GPU's memory that a preset may take as counted: the rest is for what was not, such
as CUDA's own, the kernels' workspace, a block that is recomputed and pieces between allocations."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's settings for a GPU."""

    trained: str
    micro_batch: int
    gib: float
    """Memory as counted, activations included."""

    def __str__(self) -> str:
        """Describe it as a cell of the table."""
        return f"{self.trained}, {self.micro_batch}: {self.gib:.1f}"


def read_preset(model: str, size: int) -> Preset | None:
    """Read a preset, and count what it takes on one GPU; None where the model does not fit."""
    path = FOLDER / model / f"{size}gb.yaml"
    if not path.exists():
        return None
    chosen: Any = OmegaConf.to_container(OmegaConf.load(path))
    groups = {
        name.removeprefix("override /"): choice
        for entry in chosen["defaults"]
        for name, choice in entry.items()
    }
    kind = Quantize(chosen.get("model", {}).get("quantize", "none"))
    spec = _spec(groups, chosen["train"])
    name, shape = MODELS[model]
    left_out = {"text": 0} if groups.get("texts") == "model" else {}
    left_out |= {"vae": 0} if groups.get("latents") == "model" else {}
    counts = published(name, spec.lora.rank or 0, kind, **left_out)
    states = estimate_memory(counts, spec, 1, vae_in_fp32=name in FP32_VAES).total / GIB
    a_pair = COUNTED[shape][list(ActivationCheckpointing).index(spec.gradient_checkpointing)]
    base = "" if kind is Quantize.none else f" on {kind.value}"
    in_8_bits = "" if spec.optimizer.kind is OptimizerKind.adamw else f", {groups['optimizer']}"
    trained = f"LoRA{base}" if spec.lora.rank else f"all{in_8_bits}"
    return Preset(
        trained=trained, micro_batch=spec.micro_batch, gib=states + a_pair * spec.micro_batch
    )


def _spec(groups: dict[str, str], train: dict[str, Any]) -> TrainSpec:
    """The settings that decide the memory."""
    return TrainSpec(
        lora=LoraSpec(rank=USUAL_RANK if groups["tuning"] == "lora" else 0),
        optimizer=OptimizerSpec(kind=OptimizerKind(groups.get("optimizer", "adamw"))),
        micro_batch=train["micro_batch"],
        gradient_checkpointing=ActivationCheckpointing(train["gradient_checkpointing"]),
    )


def table() -> str:
    """What each preset trains, its micro-batch and GiB, as Markdown."""
    lines = [
        f"| `model=` | {' | '.join(f'{size} GB' for size in SIZES)} |",
        "|---|" + "---|" * len(SIZES),
    ]
    for model in MODELS:
        each = " | ".join(str(read_preset(model, size) or "no") for size in SIZES)
        lines.append(f"| `{model}` | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
