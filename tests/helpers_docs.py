"""The pages, the commands on them, and what make would do of a command."""

import os
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "miniature" / "README.md",
     *(ROOT / "docs").glob("*.md")]
)  # fmt: skip
"""Every page for users; a page that is added to docs/ is among them."""


def dry_run(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would do; it must not know of the make that may have started these tests."""
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
    ours = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.ready", *words]
    return subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=False)
