"""Watches for both errors rising, the known way in which preference training goes wrong. Pure.

A margin grows when the loser's error rises faster than the winner's, even while both rise: the
policy then gets worse at denoising either image, and the loss does not show it (Diffusion-SDPO,
arXiv 2511.03317). Policy and reference see the same noise, so the difference of their errors is far
less noisy than the errors.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 50
"""Logged steps over which errors are averaged."""
ENOUGH = 20
"""Fewest logged steps for a warning."""
RISE = 0.01
"""Fraction of the reference's error by which both must have risen."""
SIDES = ("winner", "loser")

WARNING = (
    "both errors rise: over the last {lines} logged steps the policy denoises winners "
    "{winner:.1%} and losers {loser:.1%} worse than the reference, which loss and margin do not "
    "show. Look at images (train.samples.every), or at win rates and the distance from the base "
    "(make eval); if they get worse, take fewer steps, a lower train.lr, or objective=sdpo, which "
    "protects winners"
)


@dataclass(slots=True)
class ErrorMonitor:
    """The policy's errors against the reference's over the last logged steps."""

    lines: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    warned: bool = False
    """Whether the warning was given; once is enough."""

    def add(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Return further fields of a step's line.

        `winner_rise` and `loser_rise` are relative, above 0 if the policy is worse; null under an
        objective without a reference. `both_rise` is whether both exceed `RISE`.
        """
        self.lines.append(line)
        rises = {f"{side}_rise": self._rise(side) for side in SIDES}
        known = [rise for rise in rises.values() if rise is not None]
        both = len(known) == 2 and len(self.lines) >= ENOUGH and min(known) > RISE
        return {**rises, "both_rise": both}

    def _rise(self, side: str) -> float | None:
        reference = [line[f"reference_{side}_error"] for line in self.lines]
        if None in reference:
            return None
        policy = sum(line[f"policy_{side}_error"] for line in self.lines)
        return float(policy / sum(reference) - 1)

    def warning(self, rises: Mapping[str, Any]) -> str | None:
        """Return the warning to print now, if any; `rises` is what `add` returned."""
        if self.warned or not rises["both_rise"]:
            return None
        self.warned = True
        return WARNING.format(
            lines=len(self.lines), winner=rises["winner_rise"], loser=rises["loser_rise"]
        )

    def resume(self, lines: list[dict[str, Any]]) -> None:
        """Take up the log's lines of an interrupted run."""
        self.lines.extend(lines)
        self.warned = any(line.get("both_rise") for line in lines)
