"""Reads stage one's encoded prompts, in place of the text encoders.

Unlike latents they are not read in whole windows: the pairs of a window may have thousands of
prompts, of 4 MiB each. So each row of a file is a row group of its own, and the prompts of a batch
are read when the batch is prepared.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.artifacts.atomic import ShardError, sha256_of
from data.artifacts.manifest import part_name
from data.artifacts.parquet_io import read_settings, read_table
from data.artifacts.schemas import TEXT_PROMPTS
from data.artifacts.texts import AGAIN, PART_PROMPTS, PROMPTS, TextSet, listing_identity
from data.devices import Dtype
from data.models.family import PromptEmbeds
from train.loader.latent_source import blob_bytes

OPEN_FILES = 64
"""Files kept open; opening one reads its footer."""


@dataclass(slots=True)
class CachedTexts:
    """The encoded prompts of a set; called with prompts as a model's text encoders are."""

    text_set: TextSet
    prompts: Sequence[str]
    """The prompts of all rows of the set."""
    rows: dict[str, int] = field(init=False)
    """Prompt -> its row in the set."""
    _open: OrderedDict[int, pq.ParquetFile] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.rows = {prompt: row for row, prompt in enumerate(self.prompts)}

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Read prompts, in the format on disk.

        Raises:
            ShardError: A file is damaged, or the set lacks a prompt.
        """
        self.check(prompts)
        rows = [self._read(self.rows[prompt]) for prompt in prompts]
        states, pooled, length = zip(*rows, strict=True)
        shape = self.text_set.shape
        return PromptEmbeds(
            torch.stack(states),
            torch.stack(pooled) if shape.pooled else None,
            torch.tensor(length) if shape.length else None,
        )

    def check(self, prompts: Sequence[str], hint: str = "") -> None:
        """Refuse prompts that the set has not.

        Raises:
            ShardError: Names the first one, and says what to do.
        """
        folder = self.text_set.folder
        for prompt in prompts:
            if prompt not in self.rows:
                raise ShardError(f"{folder} lacks the prompt {prompt!r}; {hint or _again(folder)}")

    def _read(self, row: int) -> tuple[Tensor, Tensor, int]:
        """States, pooled form and number of tokens of a row; empty and 0 where there is none."""
        part, index = divmod(row, PART_PROMPTS)
        try:
            table = self._file(part).read_row_group(index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            path = self.text_set.folder / part_name(part)
            raise ShardError(f"{path} cannot be read ({error}); {_again(path.parent)}") from error
        dtype, shape = Dtype(self.text_set.form.dtype).torch, self.text_set.shape
        states = blob_bytes(table["states"]).view(dtype).view(shape.states)
        pooled = states.new_empty(0)
        if shape.pooled:
            pooled = blob_bytes(table["pooled"]).view(dtype).view(shape.pooled)
        return states, pooled, table["length"][0].as_py() if shape.length else 0

    def _file(self, part: int) -> pq.ParquetFile:
        if part not in self._open:
            path = self.text_set.folder / part_name(part)
            own = listing_identity(self.prompts[part * PART_PROMPTS : (part + 1) * PART_PROMPTS])
            if read_settings(path).get("prompts") != own:
                raise ShardError(
                    f"{path} has other prompts than {PROMPTS} says; {_again(path.parent)}"
                )
            file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
            self._open[part] = file
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[part]


def _again(folder: object) -> str:
    return AGAIN.format(folder=folder)


def open_texts(text_set: TextSet, prompts: Sequence[str], samples: Sequence[str]) -> CachedTexts:
    """Open a set for a run that trains on these prompts, and samples those.

    Raises:
        ShardError: A file is missing or is not the one in the manifest, or the set lacks a prompt.
    """
    for file in text_set.manifest.files:
        path = text_set.folder / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            state = "has another size than its manifest says" if path.is_file() else "is missing"
            raise ShardError(f"{path} {state}; {_again(text_set.folder)}")
        if file.name == PROMPTS and sha256_of(path) != file.sha256:
            raise ShardError(f"{path} was changed; {_again(text_set.folder)}")
    listing = read_table(text_set.folder / PROMPTS, TEXT_PROMPTS)["prompt"].to_pylist()
    texts = CachedTexts(text_set, listing)
    texts.check(["", *prompts])
    texts.check(
        samples,
        "train.samples.prompts must be prompts of the labelled pairs, unless train.texts=never "
        "loads the text encoders",
    )
    return texts
