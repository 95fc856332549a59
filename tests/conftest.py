"""Fixtures of several test files, and which tests run in one process."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")  # where others use the cores, too, any example may take long

SLOW_FILES = (
    "test_ahead", "test_command_line", "test_conf", "test_docs",  # compose settings
    "test_evaluate_cli", "test_label_cli",  # run a stage
    "test_latents", "test_pair_stages", "test_parity", "test_reproduce", "test_score.py",
    "test_blip", "test_golden", "test_hps_v3", "test_lora", "test_metrics",  # networks
    "test_miniature_world", "test_mps", "test_quantized", "test_report", "test_generate_pairs",
    "test_passes", "test_spoiled_models", "test_stores", "test_flow", "test_texts",
    # import diffusers, transformers or open_clip, which takes longer than their tests
    "test_activation_checkpointing", "test_bench", "test_bucket_runs", "test_channels_last",
    "test_checkpoint",
    "test_components", "test_devices", "test_distance", "test_export", "test_finite_images",
    "test_flops",
    "test_forward_process", "test_gpu", "test_judge", "test_kills", "test_label_failures",
    "test_label_report", "test_memory", "test_miniature_build", "test_miniature_flow",
    "test_model_folder", "test_objectives", "test_reference", "test_sample", "test_scale_out",
    "test_spoiled_runs", "test_train", "test_validation",
)  # fmt: skip
"""Files that are slow as a whole: `make test-fast` does not even import them."""
TESTS = Path(__file__).parent
SOURCES = {path.name: path.read_text() for path in TESTS.glob("test_*.py")}
STARTING = {name for name, text in SOURCES.items() if "mark.ranks" in text}
RANK_FILES = {name for name in STARTING if "shared_place" in SOURCES[name]}
"""Files with tests that start ranks which train, and share their base and straight runs."""
PROGRAM_FILES = STARTING - RANK_FILES
"""Files with other tests that start ranks, or whole programs."""
LABEL_FILES = {name for name, text in SOURCES.items() if "nursery()" in text} - STARTING
"""Files that run stage one in forks."""


COMPOSED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the processes of this run a folder for what `tests/helpers_compose.py` composes."""
    if "TESTS_COMPOSED" not in os.environ:  # else another process of the run has done so
        config.stash[COMPOSED] = tempfile.mkdtemp(prefix="balanceddpo-composed-")
        os.environ["TESTS_COMPOSED"] = config.stash[COMPOSED]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow files out of a run without slow tests, unless they are named."""
    unwanted = "not slow" in config.option.markexpr and not config.option.keyword
    return True if unwanted and collection_path.name.startswith(SLOW_FILES) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files; put those of long files first, so that no core ends early."""
    for item in items:
        if item.path.name.startswith(SLOW_FILES):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[bool, ...]:
        name = item.path.name
        groups = RANK_FILES, PROGRAM_FILES, LABEL_FILES
        return *(name not in group for group in groups), item.path not in slow_files

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Let no garbage collection walk through all that is imported by now."""
    if "conf.job" in sys.modules:
        from tests import helpers_compose

        helpers_compose.begin()
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Collect it at the end: extension modules print what they find alive."""
    gc.unfreeze()
    if COMPOSED in config.stash:
        shutil.rmtree(config.stash[COMPOSED])
        del os.environ["TESTS_COMPOSED"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process, and those of all files of a group.

    The fixtures of a file are made once. A group shares a fork server, whose imports take 15 s of a
    core, and straight runs; and ranks of two tests at once on two cores would spend much of their
    time waiting for each other. (`--dist loadgroup` does not see groups under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0].rpartition("/")[2]
            groups = {"ranks": RANK_FILES, "programs": PROGRAM_FILES, "labels": LABEL_FILES}
            return next((group for group, files in groups.items() if name in files), name)

    return Groups(config, log)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
