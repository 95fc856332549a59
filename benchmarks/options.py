"""What each setting of stage two brings: `make bench-train ARGS=--options`."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.race import race, ratio
from benchmarks.worlds import WORLDS, training_run, write_latents, write_world
from data.storage.prefetch import prefetch
from train.config import ActivationCheckpointing, Precision
from train.distributed.world import World
from train.dpo.step import prefetch_noise
from train.loader.order import Position
from train.trainer.build import make_trainer, open_stream
from train.trainer.trainer import READ_AHEAD, Trainer

OPTIONS: Mapping[str, dict[str, Any]] = {
    "train.precision=bf16": {"precision": Precision.bf16},
    "train.channels_last=true": {"channels_last": True},
    "train.compile=true": {"compile": True},
    "train.gradient_checkpointing=selective": {
        "gradient_checkpointing": ActivationCheckpointing.selective
    },
    "train.gradient_checkpointing=full": {"gradient_checkpointing": ActivationCheckpointing.full},
}
"""Each alone, against a run with none of them in fp32; latents are ready for all."""


def with_words(words: Sequence[str]) -> tuple[str, ...]:
    """The options that have one of the words in their names; all where no word is given."""
    return tuple(o for o in OPTIONS if not words or any(word in o for word in words))


def effects(
    name: str,
    root: Path,
    here: World,
    some: Sequence[str],
    *,
    batch: int,
    blocks: int,
) -> dict[str, dict[str, float]]:
    """Setting -> its speed over that without, and what a step takes of a GPU's memory (GiB)."""
    world, effect_of = WORLDS[name], {}
    write_world(world, root, pairs=4 * batch)
    latents = write_latents(world, root)

    def trainer_with(**changes: Any) -> Trainer:
        plain: dict[str, Any] = {"precision": Precision.fp32, "channels_last": False}
        given = {"batch": batch, "micro_batch": batch, "stage": 2} | plain | changes
        run = replace(training_run(world, root, **given), latents=latents)
        return make_trainer(run, here, open_stream(run, here), Console(quiet=True))

    plain = trainer_with()
    for option in some:
        changed = trainer_with(**OPTIONS[option])
        with ExitStack() as stack:
            contenders = {}
            for who, trainer in (("plain", plain), ("changed", changed)):
                batches = prefetch_noise(
                    trainer.stream.batches(Position()), trainer.draw_rule, here.device
                )
                ready = stack.enter_context(prefetch(batches, READ_AHEAD))
                contenders[who] = lambda t=trainer, r=ready: t.optimizer_step(r)
            speeds = race(contenders, blocks=blocks, steps=1, pairs=batch)
            effect_of[option] = {"times_faster": ratio(speeds["changed"], speeds["plain"])}
            if here.device.type == "cuda":
                effect_of[option] |= {who: _step_gib(run) for who, run in contenders.items()}
        del changed
    return effect_of


def _step_gib(run: Any) -> float:
    """What a step takes at its peak beyond what is in memory anyway."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def show(effect_of: Mapping[str, Mapping[str, float]]) -> None:
    """The table."""
    table = Table("setting", "times faster", "GiB a step takes", "without")
    for option, one in effect_of.items():
        memory = (f"{one[who]:.1f}" if who in one else "–" for who in ("changed", "plain"))
        table.add_row(option, f"{one['times_faster']:.2f}", *memory)
    Console(width=120).print(table)
