"""docs/training.md: its table has the journal's fields, its list is true."""

import re

import pytest

from tests.helpers_ranks import ROOT, shared_place, straight
from train.config import resumable_fields
from train.trainer.validation import FIELDS

PAGE = (ROOT / "docs" / "training.md").read_text()


def test_what_may_change_between_two_parts_of_a_run():
    sentence = PAGE.split("May change between two parts of a run:")[1].split(". Any other")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == resumable_fields()


@pytest.mark.ranks
def test_the_table_has_every_field_of_the_journal():
    table = PAGE.split("## The journal")[1].split("\n\n**")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`([a-z_]+)`", " ".join(first)))
    fields = set(shared_place().journal(straight(2, 1))[0])
    assert named == fields - {"step"}
    assert all(field.startswith("validation_") for field in FIELDS)
    assert "`validation_...`" in table
