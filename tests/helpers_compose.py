"""Settings composed by Hydra once for each choice of groups, and read again by all processes.

Composing takes 0.2 s, and a run of all tests does it some thousand times. Most command lines differ
in their values alone, which Hydra sets last of all.
"""

import os
import pickle
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from conf import job
from data.artifacts.atomic import write_bytes

FOLDER = "TESTS_COMPOSED"
"""Variable with the folder in which a session keeps what it has composed."""
by_hydra = job._compose


def compose(overrides: Sequence[str], *, choices: bool = False) -> Any:
    """What Hydra composes; it does so itself where a mistake must get its answer."""
    if choices:
        return by_hydra(overrides, choices=True)
    try:
        return _composed(list(overrides))
    except Exception:
        return by_hydra(overrides)


def _composed(overrides: list[str]) -> Any:
    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(one.is_sweep_override() or one.is_hydra_override() for one in parsed):
        return by_hydra(overrides)
    config = _with_groups(
        [text for text, one in zip(overrides, parsed, strict=True) if _group(one)]
    )
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if not _group(one)], config)
    return config


def _group(override: Override) -> bool:
    return (job.FOLDER / override.key_or_group).is_dir()


def _with_groups(chosen: list[str]) -> Any:
    key = sha256(repr((str(job.FOLDER), chosen)).encode()).hexdigest()
    path = Path(os.environ[FOLDER]) / key
    if not path.exists():
        write_bytes(path, pickle.dumps(by_hydra(chosen)))
    return pickle.loads(path.read_bytes())


def begin() -> None:
    """From here on this process, and all that it forks, compose so."""
    job._compose = compose
