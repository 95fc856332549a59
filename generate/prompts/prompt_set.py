"""A prompt set: a list of distinct prompts, with counts of the rows left out.

The initial noise of an image depends on its prompt's text, so a prompt that occurs twice in a set
would give the same image twice and count twice. Repeated and empty rows are left out and counted,
and so are the prompts that the run trains on, with `exclude_trained`.
"""

import json
from dataclasses import dataclass
from hashlib import sha256

from data.pairs.config import PairsSpec
from generate.config import PromptsSpec
from generate.prompts.files import Prompt, read_prompts, trained_prompts, wording
from generate.prompts.text_files import PromptsError


@dataclass(frozen=True, slots=True, kw_only=True)
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

    @property
    def sha256(self) -> str:
        """SHA-256 over ids and texts in order: equal hashes mean the same prompts."""
        rows = [[prompt.id, prompt.text] for prompt in self.prompts]
        return sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def counts(self) -> str:
        """How many rows were kept and left out; the numbers add up to the rows read."""
        total = len(self.prompts) + self.empty + self.repeated + self.trained
        left_out = f"empty {self.empty} · repeated {self.repeated}"
        if self.trained:
            left_out += f" · in training pairs {self.trained}"
        return f"prompts {len(self.prompts)} · {left_out} · total {total}"


def load_prompts(spec: PromptsSpec, pairs: PairsSpec | None = None) -> PromptSet:
    """Read a prompt set; with `max_prompts`, only that many distinct prompts from the start.

    `pairs` are what the run trains on: the source of `kind: pairs`, and what `exclude_trained`
    leaves out.

    Raises:
        PromptsError: The file is missing, has another layout, or has no prompt.
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
        used = f"; {trained} of its rows have a training pair's prompt" if trained else ""
        raise PromptsError(
            f"the prompt set {spec.name!r} ({spec.path or spec.split}) has no prompt{used}; "
            "choose another with prompts=... or evaluate.prompts.path=..."
        )
    return PromptSet(
        name=spec.name,
        prompts=tuple(kept.values()),
        empty=empty,
        repeated=repeated,
        trained=trained,
    )
