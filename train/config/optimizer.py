"""Settings of the optimizer."""

from dataclasses import dataclass, field
from enum import Enum

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""AdamW's usual constants."""


class OptimizerKind(Enum):
    """What is done with the gradients."""

    adamw = "adamw"
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2), with two fp32 averages for each weight."""
    adafactor = "adafactor"
    """Adafactor (Shazeer and Stern 2018), torch's: sums over rows and columns; ZeRO stage 0."""
    adamw8bit = "adamw8bit"
    """AdamW with averages in 8 bits (Dettmers et al. 2022), by bitsandbytes; on GPUs."""
    paged_adamw8bit = "paged_adamw8bit"
    """The same, whose averages move to the machine's memory while the GPU's is full."""


@dataclass(kw_only=True, slots=True)
class OptimizerSpec:
    """The optimizer and its constants."""

    kind: OptimizerKind = OptimizerKind.adamw
    """Which one."""
    betas: list[float] = field(default_factory=lambda: [*BETAS])
    """AdamW's decay of the gradient's and of its square's running averages, each in [0, 1)."""
    epsilon: float = EPSILON
    """AdamW's: added to the square root that an update is divided by; above 0."""
    weight_decay: float = 0.01
    """Decoupled: each step takes lr x weight_decay of a weight; not negative."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"train.optimizer.betas={self.betas}; give two numbers in [0, 1), as [0.9,0.999]"
            )
        if not self.epsilon > 0:
            raise ValueError(f"train.optimizer.epsilon={self.epsilon}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(
                f"train.optimizer.weight_decay={self.weight_decay}; it must not be negative"
            )
        is_usual = (tuple(self.betas), self.epsilon) == (BETAS, EPSILON)
        if self.kind is OptimizerKind.adafactor and not is_usual:
            raise ValueError(
                f"train.optimizer.betas={self.betas} and epsilon={self.epsilon:g} are AdamW's and "
                "have no meaning for train.optimizer.kind=adafactor; leave them out"
            )
