"""Spoiled settings of every stage: refused by name when the job is composed, before any work."""

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.command_line import as_text
from conf.job import FOLDER, Job, checked, entry, explain, schema

pytestmark = pytest.mark.slow

NUMBERS = ("nan", "-inf", "1e400", "-1", "''", "text", "[1,2]", "{a: 1}")
WRONG: dict[type, tuple[str, ...]] = {
    int: (*NUMBERS, "1.5", "100000000000000000000000"),
    float: NUMBERS,
    bool: ("nan", "1.5", "''", "text", "[1,2]", "{a: 1}"),
    str: (),
    list: ("nan", "7", "text", "{a: 1}", "[[1]]"),
    dict: ("nan", "7", "text", "[1,2]"),
}
FREE = ("options",)
"""Settings of one's own layouts and metrics."""


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its type."""
    for name, hint in get_type_hints(kind).items():
        if name not in {item.name for item in fields(kind)} or name in FREE:
            continue
        if is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def wrong_values(hint: Any) -> tuple[str, ...]:
    if hint is Any:  # one number or a list of them
        return ("nan", "1e400", "-1", "''", "text", "{a: 1}", "[]", "[nan]", "[[1]]")
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    plain = hint if isinstance(hint, type) and not kinds else getattr(hint, "__origin__", None)
    kind = plain if isinstance(plain, type) else get_origin(kinds[0]) or kinds[0]
    if issubclass(kind, Enum):
        return ("nan", "7", "''", "no_such", "[1,2]", "{a: 1}")
    return WRONG[kind]


@pytest.fixture(scope="module")
def sound() -> bytes:
    """A composed configuration, pickled: it is read in half the time of a deep copy."""
    ConfigStore.instance().store(name="job_schema", node=schema())
    given = ["pairs.root=/x", "model.path=/x", "evaluate.prompts.path=/x"]
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return pickle.dumps(hydra.compose("job", overrides=given))


def refusal(sound: bytes, argument: str) -> str:
    """What is said of an argument, as `conf.job.entry` does; empty where it is taken."""
    config = pickle.loads(sound)
    try:
        (override,) = OverridesParser.create().parse_overrides(as_text([argument], Job))
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        checked(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return explain(error)
    return ""


def test_no_wrong_value_is_taken(sound: bytes, capsys: pytest.CaptureFixture[str]):
    settings = [*leaves(Job), ("metrics.clip.tie", float)]
    arguments = [f"{name}={value}" for name, hint in settings for value in wrong_values(hint)]
    faults = []
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.rpartition(".")[2] not in (said := refusal(sound, argument)):
            faults.append(f"{argument}: {said or 'was taken'}")
    with capsys.disabled():
        print(f"\n{len(arguments)} spoiled settings tried")
    assert not faults, "\n".join(faults)
    assert len(arguments) > 500


@pytest.mark.parametrize(
    "argument",
    ["train.lr=nan", "seed=-1", "train.no_such=1", "evaluate.guidance=inf", "label.workers=5000",
     "evaluate.resamples=2000000000", "vote.name=''", "run=", "run=..", "evaluate.folder=labels",
     "panel.voters=[clip, clip]", "panel.held_out=[clip]", "metrics.clip.tie=-1"],
)  # fmt: skip
def test_it_is_said_in_one_line(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main(_: Job) -> None:
        raise AssertionError("begins to work")

    monkeypatch.setattr("sys.argv", ["label", argument])
    with pytest.raises(SystemExit) as ended:
        entry(main)()
    assert ended.value.code == 2
    first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert argument.partition("=")[0] in first
