"""A process that keeps its freed memory reuses it."""

import subprocess
import sys

import pytest

from tests.helpers_ranks import ROOT

PROGRAM = """
import resource, sys
from train.distributed.malloc import keep_freed_memory
assert keep_freed_memory() if sys.argv[1] == "keep" else True
def fill():
    block = bytearray(64 << 20)
    block[:: 4096] = b"1" * len(block[:: 4096])
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (64 << 20) // 4096


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again():
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return int(done.stdout)

    assert faults("keep") < PAGES / 10
    assert faults("give back") > 2 * PAGES  # or this shows nothing
