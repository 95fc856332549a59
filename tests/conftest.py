"""Fixtures of several test files, and which tests run in one process."""

from collections.abc import Iterator
from zlib import crc32

import pytest

WHOLE_COMMANDS = ("test_docs", "test_evaluate_cli", "test_label_cli")
"""Files whose every test composes commands or runs a stage: slow as a whole."""

RANK_GROUPS = 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of whole commands as slow; put each test into a group for `--dist loadgroup`.

    A file is a group, so that its fixtures are made once. Tests with ranks are three groups, by
    file: those of a group share a fork server, whose imports take 20 s of a core, and they wait for
    each other's ranks so much that one group alone would take longer than all other tests.
    """
    for item in items:
        if item.path.name.startswith(WHOLE_COMMANDS):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("xdist_group") is None:
            ranks = item.get_closest_marker("ranks") is not None
            group = (
                f"ranks {crc32(item.path.name.encode()) % RANK_GROUPS}" if ranks else item.path.name
            )
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much where cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
