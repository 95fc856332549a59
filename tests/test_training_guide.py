"""docs/training.md: its commands compose, its table has the journal's fields, its list is true."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf.job import Job
from tests.helpers_ranks import ROOT, shared_place, straight
from train.config import WITHOUT_EFFECT
from train.validation import FIELDS

PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^    (make (?:train|smoke)\b[^#\n]*)", PAGE, re.MULTILINE)


def overrides(command: str) -> list[str]:
    """What the Makefile hands on to `python -m train`."""
    variables = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    run = [f"run={variables['RUN']}"] if "RUN" in variables else []
    smoke = ["debug=smoke"] if shlex.split(command)[1] == "smoke" else []
    return run + smoke + shlex.split(variables.get("ARGS", ""))


def test_there_are_commands():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str):
    ConfigStore.instance().store(name="job_schema", node=Job)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        job = OmegaConf.to_object(compose("job", overrides=overrides(command)))
    assert isinstance(job, Job)


def test_what_may_change_between_two_parts_of_a_run():
    sentence = PAGE.split("May change between two parts of a run:")[1].split(". Any other")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(WITHOUT_EFFECT)


@pytest.mark.ranks
def test_the_table_has_every_field_of_the_journal():
    table = PAGE.split("## The journal")[1].split("\n\n**")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([a-z_]+)`", " ".join(first)))
    fields = set(shared_place().journal(straight(2, 1))[0])
    assert named == fields - {"step"}
    assert all(field.startswith("validation_") for field in FIELDS)
    assert "`validation_...`" in table
