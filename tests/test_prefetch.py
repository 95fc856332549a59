"""Prefetching in a thread changes nothing but the time."""

import time
from itertools import islice

import pytest

from data.artifacts.atomic import ShardError
from data.storage.prefetch import prefetch


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_prefetching_changes_nothing(depth: int):
    with prefetch(iter(range(20)), depth) as items:
        assert list(islice(items, 15)) == list(range(15))


def test_the_next_items_are_ready_before_they_are_wanted():
    produced = []

    def items():
        for number in range(100):
            produced.append(number)
            yield number

    with prefetch(items(), 3) as ready:
        for taken in range(5):
            assert next(ready) == taken
            deadline = time.monotonic() + 60
            while len(produced) < taken + 5 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(produced) == taken + 5  # those taken, three that wait, one in the hand


def test_an_error_is_raised_in_its_items_turn():
    def items():
        yield 1
        raise ShardError("broken")

    with prefetch(items(), 4) as ready:
        assert next(ready) == 1
        with pytest.raises(ShardError, match="broken"):
            next(ready)


def test_leaving_stops_the_thread():
    produced = []

    def items():
        while True:
            produced.append(1)
            yield 1

    with prefetch(items(), 2) as ready:
        next(ready)
    count = len(produced)
    assert count <= 5
    assert len(produced) == count
