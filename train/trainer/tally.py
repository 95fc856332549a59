"""What a step measured: summed over micro-batches, reduced over ranks.

The keys are those of every objective. `loss` is the objective's own, vote weights included. Under
`mapo`, which has no reference, `margin` is the loser's error minus the winner's, `accuracy` the
fraction of pairs for which that is above 0, and the reference's errors are null.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.distributed.world import World
from train.dpo.step import StepOutput

BUCKETS = 5
"""Parts of the noise schedule for which accuracy is reported separately."""

MEANS = ("loss", "accuracy", "margin", "policy_winner_error", "policy_loser_error",
         "reference_winner_error", "reference_loser_error")  # fmt: skip
OF_REFERENCE = MEANS[-2:]
"""NaN inside, and null in the log, under an objective without a reference."""


@dataclass(slots=True)
class Tally:
    """Sums over the pairs of one optimizer step, in float64 on the device: one sync a step."""

    sums: Tensor
    """Sums of `MEANS`; then of accuracy by bucket; then pairs by bucket."""
    margins: list[Tensor] = field(default_factory=list)
    """Each pair's, by micro-batch."""
    pairs: int = 0
    waited_s: float = 0.0
    """Seconds spent waiting for data."""

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        """A tally of no pairs."""
        return cls(torch.zeros(len(MEANS) + 2 * BUCKETS, dtype=torch.float64, device=device))

    def add(self, output: StepOutput, waited_s: float) -> None:
        """Count the pairs of a micro-batch."""
        right = (output.margin > 0).double() + 0.5 * (output.margin == 0)  # a tie is half right
        means = [output.losses, right, output.margin, output.policy.winner, output.policy.loser,
                 output.reference.winner, output.reference.loser]  # fmt: skip
        bucket = (output.timestep * BUCKETS).long().clamp(max=BUCKETS - 1)
        by_bucket = self.sums.new_zeros(2, BUCKETS)
        by_bucket[0].index_add_(0, bucket, right)
        by_bucket[1].index_add_(0, bucket, torch.ones_like(right))
        sums = torch.stack([mean.double().sum() for mean in means])
        self.sums += torch.cat([sums, by_bucket.flatten()])
        self.margins.append(output.margin.double())
        self.pairs += len(right)
        self.waited_s += waited_s

    def reduce(self, world: World) -> dict[str, Any]:
        """Return the means over the global batch, and `margins` in ascending order.

        Equal on all ranks. Every rank has counted as many pairs as the others.
        """
        of_host = self.sums.new_tensor([self.pairs, self.waited_s])
        margins = self.sums.new_zeros(world.world_size, self.pairs)
        margins[world.rank] = torch.cat(self.margins)  # a sum with zeros gathers them
        parts = [self.sums, of_host, margins.flatten()]
        total = world.all_reduce(torch.cat(parts)).tolist()  # the host waits here
        num_sums = len(self.sums)
        means, buckets = total[: len(MEANS)], total[len(MEANS) : num_sums]
        pairs, waited = total[num_sums : num_sums + 2]
        right, counts = buckets[:BUCKETS], buckets[BUCKETS:]
        return {
            **{
                name: None if name in OF_REFERENCE and math.isnan(value) else value / pairs
                for name, value in zip(MEANS, means, strict=True)
            },
            "accuracy_by_timestep": [
                r / n if n else None for r, n in zip(right, counts, strict=True)
            ],
            "data_wait_s": waited / world.world_size,
            "margins": sorted(total[num_sums + 2 :]),
        }


def quantiles(margins: Sequence[float]) -> list[float]:
    """The least of margins in ascending order, their nine deciles (nearest rank), the greatest."""
    last = len(margins) - 1
    return [margins[round(tenth * last / 10)] for tenth in range(11)]


class Stopwatch:
    """Measures laps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed
