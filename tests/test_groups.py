"""Tests side by side: those of a file stay in one process, and share its fixtures."""

import pytest

from tests.conftest import RANK_FILES, TESTS


@pytest.mark.parametrize("turn", range(6))
def test_a_file_stays_in_one_process(
    turn: int, worker_id: str, testrun_uid: str, tmp_path_factory: pytest.TempPathFactory
):
    """Under xdist, which gives neighbours to different processes where it sees no groups."""
    everyones = tmp_path_factory.getbasetemp().parent
    mark = everyones / f"{testrun_uid}-{worker_id}"
    mark.touch()
    assert list(everyones.glob(f"{testrun_uid}-*")) == [mark]


def test_files_with_ranks_are_known():
    assert {"test_kills.py", "test_train.py", "test_lora.py"} <= RANK_FILES
    assert "test_names.py" not in RANK_FILES
    assert all((TESTS / name).is_file() for name in RANK_FILES)
