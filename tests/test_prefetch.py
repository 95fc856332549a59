"""Working ahead in a thread changes nothing but the time."""

import time
from itertools import islice

import pytest

from data.artifacts.atomic import ShardError
from data.prefetch import prefetch


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_working_ahead_changes_nothing(depth: int):
    with prefetch(iter(range(20)), depth) as items:
        assert list(islice(items, 15)) == list(range(15))


def test_the_next_items_are_made_before_they_are_asked_for():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    with prefetch(items(), 3) as found:
        for taken in range(5):
            assert next(found) == taken
            deadline = time.monotonic() + 60
            while len(made) < taken + 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(made) == taken + 5  # what was taken, three that wait, one to be put there


def test_an_error_ahead_comes_in_its_turn():
    def items():
        yield 1
        raise ShardError("broken")

    with prefetch(items(), 4) as found:
        assert next(found) == 1
        with pytest.raises(ShardError, match="broken"):
            next(found)


def test_leaving_stops_the_thread():
    made = []

    def items():
        while True:
            made.append(1)
            yield 1

    with prefetch(items(), 2) as found:
        next(found)
    count = len(made)
    assert count <= 5
    assert len(made) == count
