"""A large checkpoint is converted for another number of ranks by several processes."""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from train.distributed import deepspeed_engine
from train.distributed.deepspeed_engine import num_merge_workers, to_universal


def test_a_large_checkpoint_is_merged_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fork of this process could use neither its threads nor its GPU."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "shard.pt").write_bytes(bytes(100))
    calls: list[tuple[Namespace, str]] = []
    package, checkpoint, converter = map(
        ModuleType,
        ("deepspeed", "deepspeed.checkpoint", "deepspeed.checkpoint.ds_to_universal"),
    )

    def main(options: Namespace) -> None:
        with vars(converter)["ProcessPoolExecutor"](max_workers=1) as executor:
            calls.append((options, executor._mp_context.get_start_method()))

    vars(converter).update(main=main, ProcessPoolExecutor=None)
    vars(checkpoint).update(ds_to_universal=converter)
    for module in (package, checkpoint, converter):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for above, workers in ((1000, 1), (50, 8)):
        monkeypatch.setattr(deepspeed_engine, "SPAWN_ABOVE", above)
        assert num_merge_workers(tmp_path / "engine") == workers
        to_universal(tmp_path / "engine", tmp_path / "scratch")
        options, start_method = calls[-1]
        assert options.num_merge_workers == workers
        assert options.num_extract_workers == 1
        assert start_method == "spawn"
