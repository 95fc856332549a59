"""The tests marked `gpu`, which are skipped everywhere else."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path("tests")
OPTIONS = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "-o",
           "addopts=--import-mode=importlib")  # fmt: skip
"""An image's libraries may be older than the pinned ones, and warn: that is no failure here. Shapes
are not checked, since the code is imported already."""


class Outcomes:
    """Counts the tests by how they ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: when it was called, or when it never came to that."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid)


def measure(folder: Path, *, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run them in this process; those that need more GPUs than there are skip themselves.

    Raises:
        RuntimeError: One failed; names it.
    """
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in
             path.read_text()]  # fmt: skip
    outcomes, temporary = Outcomes(), folder / "pytest"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*OPTIONS, f"--basetemp={temporary}", *options, *files]
    status = pytest.main(arguments, plugins=[outcomes])
    if outcomes.failed or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"failed: {', '.join(outcomes.failed) or f'pytest ended with {status}'}")
    note = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.counts.items())
    return {"rows": [{"note": note or "no test"}], "tests": dict(outcomes.counts)}
