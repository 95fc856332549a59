"""Prompts -> encoded prompts beside the scores (see `data/artifacts/texts.py`)."""

import shutil
from collections.abc import Iterator

import pyarrow as pa
import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor

from data.artifacts.atomic import ShardError
from data.artifacts.parquet_io import table_writer
from data.artifacts.progress import progress_bar
from data.artifacts.schemas import texts as schema_of
from data.artifacts.texts import COMPRESSION, PART_PROMPTS, TextShape
from data.devices import Dtype
from data.distributed import Rank, work_order
from data.models.family import PromptEmbeds
from data.models.folder import check_part
from data.models.text_encoders import TextEncoder, load_text_encoders
from label.scoring.batching import Batch, run_halving
from label.scoring.text_files import TextFiles


class PromptEncoder:
    """A model's text encoders, for texts of one format."""

    def __init__(self, files: TextFiles, batch: int) -> None:
        self._files, self._batch = files, Batch(batch)
        self._dtype = Dtype(files.form.dtype).torch
        self._encoders: dict[str, TextEncoder] = {}
        self._num_bytes = 0  # of a prompt's numbers, known when the encoders are loaded

    def check(self) -> None:
        """Refuse parts that are damaged or of another architecture; loads none.

        Raises:
            ValueError: Names the part.
        """
        for part in self._files.text.parts:
            check_part(self._files.model, part, f"model.path={self._files.model}")

    def load(self, device: torch.device) -> TextShape:
        """Load the text encoders; return what numbers a prompt has."""
        text, dtype = self._files.text, Dtype(self._files.form.compute).torch
        self._encoders |= load_text_encoders(
            self._files.model, text.family, text.config, device, dtype
        )
        embeds = self.encode([""])
        pooled = 0 if embeds.pooled is None else embeds.pooled.shape[1]
        shape = TextShape(
            states=(embeds.states.shape[1], embeds.states.shape[2]),
            pooled=pooled,
            length=embeds.length is not None,
        )
        self._num_bytes = sum(shape.num_bytes(self._files.form.dtype))
        return shape

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Encode prompts as the model's family does, in the format on disk."""
        text = self._files.text
        embeds = text.family.encode(self._encoders, prompts, text.config)
        return embeds.to(embeds.states.device, self._dtype)

    def rows(self, prompts: tuple[str, ...]) -> Iterator[bytes]:
        """The bytes of each prompt: states, the pooled form, the number of tokens in 32 bits.

        Every forward pass has the same size, so a row depends on nothing but its file's prompts.

        Raises:
            ValueError: A prompt's numbers are not finite; names it.
        """
        todo = list(prompts)
        while todo:
            some, todo = todo[: self._batch.size], todo[self._batch.size :]
            encoded = run_halving(self._bytes, some, self._batch).cpu()
            form, numbers = self._files.form, encoded[:, : self._num_bytes].view(self._dtype)
            if not all(finite := numbers.isfinite().all(1).tolist()):
                raise ValueError(
                    f"the text encoders of model.path={self._files.model} give numbers that "
                    f"are not finite in {form.compute} or {form.dtype} for the prompt "
                    f"{some[finite.index(False)]!r}; set label.texts.compute=fp32 and "
                    "label.texts.dtype=bf16"
                )
            yield from (row.numpy().tobytes() for row in encoded)

    def _bytes(self, prompts: list[str]) -> UInt8[Tensor, "prompt byte"]:
        embeds = self.encode(prompts)
        states, pooled, length = embeds.states.flatten(1), embeds.pooled, embeds.length
        count = None if length is None else length.int()[:, None].to(states.device)
        kinds = [kind for kind in (states, pooled, count) if kind is not None]
        return torch.cat([kind.contiguous().view(torch.uint8) for kind in kinds], 1)


def write_texts(
    files: TextFiles,
    encoder: PromptEncoder,
    rank: Rank,
    device: torch.device,
    console: Console | None,
) -> None:
    """Write this process's files, then whatever other processes have not finished.

    Without a console nothing is printed.

    Raises:
        ValueError: They do not fit on the disk, or a prompt cannot be encoded.
    """
    absent = files.absent()
    if not absent:
        return
    shape = encoder.load(device)
    check_room(files, encoder, len(absent), console)

    def done() -> int:
        left = [index for index in absent if not files.path(index).exists()]
        return len(files.prompts) - sum(len(files.prompts_of(index)) for index in left)

    with progress_bar("encoding prompts", len(files.prompts), done, console):
        for index in work_order(files.num_files, rank):
            if not files.path(index).exists():
                _write_part(files, index, encoder, shape)


def check_room(
    files: TextFiles, encoder: PromptEncoder, absent: int, console: Console | None
) -> None:
    """Say what the set takes on the disk, and refuse a disk without room for the absent files.

    Raises:
        ShardError: Says how much is needed, and what to do.
    """
    (sample,) = encoder.rows(files.prompts[-1:])
    each, count = len(pa.compress(sample, codec="lz4_raw", asbytes=True)), len(files.prompts)
    size = f"{count} prompts of about {each / 2**10:.0f} KiB, {each * count / 2**30:.2f} GiB"
    if console is not None:
        console.print(f"texts: {size} in {files.folder}", highlight=False, soft_wrap=True)
    files.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(files.folder).free
    if (needed := each * min(count, absent * PART_PROMPTS)) > free:
        raise ShardError(
            f"{files.folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} of its "
            f"{size} are to be written; free some space, choose another place (runs=...), or set "
            "texts=none"
        )


def _write_part(files: TextFiles, index: int, encoder: PromptEncoder, shape: TextShape) -> None:
    states, pooled = shape.num_bytes(files.form.dtype)
    numbers, schema = states + pooled, schema_of(states, pooled, length=shape.length)
    settings = files.settings(index) | shape.settings
    with table_writer(
        files.path(index), schema, settings, schema.names, compression=COMPRESSION
    ) as writer:
        for row in encoder.rows(files.prompts_of(index)):
            count = int.from_bytes(row[numbers:], "little")
            values = {"states": row[:states], "pooled": row[states:numbers], "length": count}
            writer.write_table(pa.Table.from_pylist([values], schema=schema))
