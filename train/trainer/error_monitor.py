"""Do both errors rise? The known way in which preference training goes wrong, seen early. Pure.

A margin grows when the loser's error rises faster than the winner's, even while both rise: the
policy then gets worse at denoising either image, and the loss does not tell (Diffusion-SDPO,
arXiv 2511.03317). Policy and reference see the same noise, so the difference of their errors is far
less noisy than the errors.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 50
"""Journal lines over which errors are averaged."""
ENOUGH = 20
"""Lines below which nothing is said."""
RISE = 0.01
"""Share of the reference's error by which both must have risen."""
SIDES = ("winner", "loser")

WARNING = (
    "both errors rise: over the last {lines} journal lines the policy denoises winners "
    "{winner:.1%} and losers {loser:.1%} worse than the reference, which loss and margin do not "
    "show. Look at images (train.samples.every) or win rates; where they get worse, take fewer "
    "steps, a lower train.lr, or objective=sdpo, which protects winners"
)


@dataclass(slots=True)
class ErrorMonitor:
    """The policy's errors against the reference's over the last journal lines."""

    lines: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    warned: bool = False
    """Whether people have been told; once is enough."""

    def add(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The journal's further fields for a step.

        `winner_rise` and `loser_rise` are relative, above 0 where the policy is the worse; null
        where the objective asks no reference. `both_rise` is whether both exceed `RISE`.
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

    def warning(self, found: Mapping[str, Any]) -> str | None:
        """What to tell people now, if anything; `found` is what `add` said."""
        if self.warned or not found["both_rise"]:
            return None
        self.warned = True
        return WARNING.format(
            lines=len(self.lines), winner=found["winner_rise"], loser=found["loser_rise"]
        )

    def go_on(self, lines: list[dict[str, Any]]) -> None:
        """Take up the journal's lines of an interrupted run."""
        self.lines.extend(lines)
        self.warned = any(line.get("both_rise") for line in lines)
