"""A prompt set: a list of distinct prompts, with counts of the rows left out.

The initial noise of an image depends on its prompt's text, so a prompt that occurs twice in a set
would give the same image twice and count twice. Repeated and empty rows are left out and counted,
and so are the prompts that the run trains on, with `exclude_trained`, and those that the judge
uses, of prompts to generate pairs for.
"""

import json
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256

from data.pairs.config import PairsSpec
from generate.config import PromptsSpec
from generate.prompts.files import JUDGE, Prompt, read_prompts, trained_prompts, wording
from generate.prompts.text_files import PromptsError


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Distinct prompts, in the order of their source."""

    name: str
    prompts: tuple[Prompt, ...]
    empty: int
    """Rows left out because they hold no text."""
    repeated: int
    """Rows left out because an earlier one has the same text."""
    trained: int = 0
    """Rows left out because a training pair has the same prompt."""
    judged: int = 0
    """Rows left out because the comparison of the models has the same prompt."""
    skipped: int = 0
    """Rows left out by `skip_prompts`."""

    @property
    def sha256(self) -> str:
        """SHA-256 over ids and texts in order: equal hashes mean the same prompts."""
        rows = [[prompt.id, prompt.text] for prompt in self.prompts]
        return sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def counts(self) -> str:
        """How many rows were kept and left out; the numbers add up to the rows read."""
        left_out = {"empty": self.empty, "repeated": self.repeated}
        more = {
            "in training pairs": self.trained,
            "of the comparison": self.judged,
            "skipped": self.skipped,
        }
        left_out |= {reason: number for reason, number in more.items() if number}
        total = len(self.prompts) + sum(left_out.values())
        reasons = " · ".join(f"{reason} {number}" for reason, number in left_out.items())
        return f"prompts {len(self.prompts)} · {reasons} · total {total}"


def load_prompts(
    spec: PromptsSpec,
    pairs: PairsSpec | None = None,
    *,
    section: str = JUDGE,
    judged: PromptSet | None = None,
) -> PromptSet:
    """Read a prompt set; with `max_prompts`, only that many distinct prompts from the start.

    `pairs` are what the run trains on: the source of `kind: pairs`, and what `exclude_trained`
    leaves out. Prompts of `judged`, the comparison's, are left out, too. `section` names the
    settings in messages.

    Raises:
        PromptsError: The file is missing, has another layout, or has no prompt.
    """
    pairs = pairs or PairsSpec()
    known = dict.fromkeys((wording(p.text) for p in judged.prompts) if judged else (), "judged")
    known |= dict.fromkeys(trained_prompts(pairs) if spec.exclude_trained else (), "trained")
    kept: dict[str, Prompt] = {}
    skipped: set[str] = set()
    count: Counter[str] = Counter()
    for prompt in read_prompts(spec, pairs, section):
        _check_characters(spec, prompt, section)
        if spec.max_prompts and len(kept) == spec.max_prompts:
            break
        if not prompt.text:
            count["empty"] += 1
        elif prompt.text in kept or prompt.text in skipped:
            count["repeated"] += 1
        elif known and (reason := known.get(wording(prompt.text))):
            count[reason] += 1
        elif len(skipped) < spec.skip_prompts:
            skipped.add(prompt.text)
        else:
            kept[prompt.text] = prompt
    numbers = {name: count[name] for name in ("empty", "repeated", "trained", "judged")}
    result = PromptSet(spec.name, tuple(kept.values()), **numbers, skipped=len(skipped))
    if not kept:
        raise PromptsError(
            f"the prompt set {spec.name!r} ({spec.path or spec.split}) has no prompt left "
            f"({result.counts}); choose another with {section}.path=..., or one of the groups in "
            "conf/prompts"
        )
    return result


def _check_characters(spec: PromptsSpec, prompt: Prompt, section: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold and no file of ours.

    Raises:
        PromptsError: Names the row.
    """
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise PromptsError(
            f"{section}.path={spec.path}, row {prompt.id}: {prompt.text!r} has half of a character "
            f"({error.object[error.start]!r}), as of a text cut in the middle; correct or remove it"
        ) from error
