"""A prompt set: one list of distinct prompts, and what became of the others.

The initial noise of an image belongs to its prompt's text, so a prompt that stands twice in a set
would give the same image twice and count twice. Repeats and empty lines are left out and counted,
and so are, where asked for, prompts that the run trains on.
"""

import json
from dataclasses import dataclass
from hashlib import sha256

from data.pairs.config import PairsSpec
from generate.config import PromptsSpec
from generate.prompts.files import Prompt, PromptsError, read_prompts, trained_prompts, wording


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The prompts of a comparison."""

    name: str
    prompts: tuple[Prompt, ...]
    empty: int
    """Rows left out because they hold no text."""
    repeated: int
    """Rows left out because an earlier one has the same text."""
    trained: int = 0
    """Rows left out because a training pair has the same prompt."""

    @property
    def sha256(self) -> str:
        """SHA-256 over ids and texts in order: two sets with the same one ask for the same."""
        rows = [[prompt.id, prompt.text] for prompt in self.prompts]
        return sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def counts(self) -> str:
        """What became of the rows; the numbers add up to the rows read."""
        total = len(self.prompts) + self.empty + self.repeated + self.trained
        left_out = f"empty {self.empty} · repeated {self.repeated}"
        if self.trained:
            left_out += f" · in training pairs {self.trained}"
        return f"prompts {len(self.prompts)} · {left_out} · total {total}"


def load_prompts(spec: PromptsSpec, pairs: PairsSpec | None = None) -> PromptSet:
    """Read a prompt set; with `max_prompts`, the first that many distinct prompts.

    `pairs` are what the run trains on: the source of `kind: pairs`, and what `exclude_trained`
    compares with.

    Raises:
        PromptsError: The file is missing, of another layout, or holds no prompt.
    """
    pairs = pairs or PairsSpec()
    known = trained_prompts(pairs) if spec.exclude_trained else set()
    kept: dict[str, Prompt] = {}
    empty = repeated = trained = 0
    for prompt in read_prompts(spec, pairs):
        if spec.max_prompts and len(kept) == spec.max_prompts:
            break
        if not prompt.text:
            empty += 1
        elif prompt.text in kept:
            repeated += 1
        elif known and wording(prompt.text) in known:
            trained += 1
        else:
            kept[prompt.text] = prompt
    if not kept:
        used = f", and {trained} rows have a training pair's prompt" if trained else ""
        raise PromptsError(
            f"the prompt set {spec.name!r} ({spec.path or spec.split}) holds no prompt{used}; "
            "choose another with prompts=... or evaluate.prompts.path=..."
        )
    return PromptSet(
        name=spec.name,
        prompts=tuple(kept.values()),
        empty=empty,
        repeated=repeated,
        trained=trained,
    )
