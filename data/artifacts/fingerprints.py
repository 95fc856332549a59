"""SHA-256 of weight files, remembered: hashing a panel's 8 GB at every start takes a while."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts.atomic import sha256_of, write_json


@dataclass(slots=True)
class Fingerprints:
    """Path -> SHA-256, remembered on disk by the file's size and time."""

    memory: Path | None = None
    """A JSON file; None remembers nothing."""

    def __call__(self, path: Path) -> str:
        """The file's SHA-256, computed again when its size or time changed."""
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known()
        match known.get(key):
            case {"state": known_state, "sha256": str(digest)} if known_state == state:
                return digest
        digest = sha256_of(path)
        if self.memory is not None:
            write_json(self.memory, known | {key: {"state": state, "sha256": digest}})
        return digest

    def _known(self) -> dict[str, Any]:
        try:
            known = json.loads(self.memory.read_text()) if self.memory else {}
        except (OSError, ValueError):  # a note to ourselves: damaged is the same as absent
            return {}
        return known if isinstance(known, dict) else {}
