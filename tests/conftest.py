"""Fixtures of several test files, and which tests run in one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

SLOW_FILES = (
    "test_docs", "test_evaluate_cli", "test_label_cli",  # compose commands or run a stage
    "test_latents", "test_pair_stages", "test_parity", "test_score.py", "test_train_latents",
    "test_blip", "test_golden", "test_hps_v3", "test_lora", "test_metrics", "test_mps",  # networks
    "test_passes", "test_sample_models", "test_flow_models", "test_flow_pipelines",
)  # fmt: skip
"""Files that are slow as a whole: `make test-fast` does not even import them."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow files out of a run without slow tests, unless they are named."""
    unwanted = "not slow" in config.option.markexpr and not config.option.keyword
    return True if unwanted and collection_path.name.startswith(SLOW_FILES) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files; put each test into a group for `--dist loadgroup`.

    A file is a group, so that its fixtures are made once. Tests with ranks are one group of all
    files: they share a fork server, whose imports take 20 s of a core, and ranks of two tests at
    once on two cores spend much of their time waiting for each other's turn.
    """
    for item in items:
        if item.path.name.startswith(SLOW_FILES):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("xdist_group") is None:
            ranks = item.get_closest_marker("ranks") is not None
            group = "ranks" if ranks else item.path.name
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
