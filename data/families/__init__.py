"""The families of models that can be aligned: one file each, named by the family.

A file that defines a `FAMILY` is one; nothing else lists them, and none imports torch.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from data.models.family import Family, ModelError


@cache
def families() -> tuple[Family, ...]:
    """All families, by the names of their files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    names = [path.stem for path in files if "\nFAMILY = " in path.read_text()]
    return tuple(import_module(f"data.families.{name}").FAMILY for name in names)


def find_family(index: Mapping[str, Any]) -> Family | None:
    """The family of a `model_index.json`; None if there is none."""
    name = index.get("_class_name")
    return next((family for family in families() if family.pipeline == name), None)


def family_of(what: str, index: Mapping[str, Any]) -> Family:
    """The family of a model, of which `index` is the `model_index.json`.

    Raises:
        ModelError: It is of none; names those there are.
    """
    family = find_family(index)
    if family is None:
        allowed = ", ".join(f"{one.pipeline} ({one.name})" for one in families())
        raise ModelError(f"{what} is a {index.get('_class_name')}; allowed are {allowed}")
    return family
