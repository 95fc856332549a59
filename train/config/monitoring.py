"""Settings of what a run shows of itself while it trains, and of what it leaves."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ValidationSpec:
    """Held-out pairs, which show whether what is learned generalizes to other prompts."""

    share: float = 0.0
    """Fraction of prompts whose pairs are held out, in [0, 1). Prompts are chosen by a hash, so no
    prompt is on both sides and every run holds out the same ones. 0 trains on all pairs."""
    pairs: int = 128
    """Most held-out pairs to evaluate."""
    every: int = 50
    """Optimizer steps between two evaluations; the last step always has one."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"train.validation.share={self.share}; it must be in [0, 1)")
        for name in ("pairs", "every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train.validation.{name}={getattr(self, name)}; it must be at least 1"
                )


@dataclass(kw_only=True, slots=True)
class SampleSpec:
    """Images of the same prompts from the same noise, generated every few steps of training."""

    every: int = 0
    """Optimizer steps between two sheets of images; 0 generates none."""
    prompts: list[str] = field(default_factory=list)
    """Prompts to generate; if empty, `count` prompts of the label set."""
    count: int = 4
    """Images in a sheet, if `prompts` is empty."""
    steps: int = 20
    """Denoising steps (DDIM)."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 switches it off."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"train.samples.every={self.every}; it must not be negative")
        for name in ("count", "steps", "guidance"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train.samples.{name}={getattr(self, name)}; it must be at least 1"
                )


@dataclass(kw_only=True, slots=True)
class ExportSpec:
    """What is written of the result besides the diffusers folder."""

    single_file: bool = False
    """Also write `single_file.safetensors` in the names of the original code, which ComfyUI and
    A1111 read: of SD1.x, SD2.x and SDXL, in fp32."""
