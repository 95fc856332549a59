"""Settings of the optimizer."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class OptimizerSpec:
    """AdamW's constants (Loshchilov and Hutter 2019, Algorithm 2)."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the gradient's and of its square's running averages, each in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the square root that an update is divided by; above 0."""
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
