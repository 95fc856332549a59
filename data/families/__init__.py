"""The families of models that can be aligned: one file each, named by the family.

A file that defines a `FAMILY` is one; nothing else lists them, and none imports torch.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from data.artifacts.readable import UnreadableError, read_json_object
from data.models.family import NO_PART, Family, ModelError

INDEX = "model_index.json"


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


def check_whole(folder: Path, what: str) -> dict[str, Any]:
    """Refuse a diffusers folder of which a part is missing, damaged or another than described.

    Messages begin with `what`, the setting or the model's name. Returns its model_index.json.

    Raises:
        UnreadableError: Names the file, what is wrong with it, and what to do.
    """
    from data.models.folder import check_model_folder  # torch and diffusers take seconds

    index = read_json_object(folder / INDEX, what)
    family = find_family(index)
    for name in family.parts_in(index) if family else ():
        if index.get(name) in (None, NO_PART):
            raise UnreadableError(
                f"{what}: {folder / INDEX} names no {name}, which a {index['_class_name']} needs"
            )
    return check_model_folder(folder, what)
