"""`+preset=24gb`: settings by the memory of a GPU, a file for each model in `conf/preset/`."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "preset"
CHOICE = re.compile(r"\+?preset=(.*)")


def with_preset(
    arguments: Sequence[str], chosen_model: Callable[[Sequence[str]], str]
) -> list[str]:
    """The arguments with `+preset=24gb` as the chosen model's file, `+preset/sdxl=24gb`.

    `chosen_model` gives the choice of the group `model` among the other arguments: an experiment
    may have made it.

    Raises:
        ValueError: The model has no presets, or none of this name; says which there are.
    """
    choices = [match.group(1) for argument in arguments if (match := CHOICE.fullmatch(argument))]
    if not choices:
        return list(arguments)
    others = [argument for argument in arguments if not CHOICE.fullmatch(argument)]
    model = chosen_model([argument for argument in others if _is_setting(argument)])
    models = sorted(path.name for path in FOLDER.iterdir())
    if model not in models:
        raise ValueError(
            f"preset={choices[-1]} has no settings for model={model}; there are some for "
            f"{', '.join(models)}. For another checkpoint choose the model that it is like, as in "
            "model=sdxl model.path=/models/mine"
        )
    sizes = sorted(path.stem for path in (FOLDER / model).iterdir())
    if choices[-1] not in sizes:
        near = difflib.get_close_matches(choices[-1], sizes, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"unknown preset {choices[-1]!r} for model={model}; {hint}allowed: {', '.join(sizes)}"
        )
    return [*others, f"+preset/{model}={choices[-1]}"]


def about(arguments: Sequence[str]) -> str:
    """The file that `with_preset` chose, and what it says of itself; empty if there is none."""
    for argument in arguments:
        if match := re.fullmatch(r"\+preset/(\w+)=(\w+)", argument):
            path = FOLDER / match[1] / f"{match[2]}.yaml"
            words = path.read_text().splitlines()[1].removeprefix("# ")
            return f"preset: {path.relative_to(FOLDER.parent.parent)}: {words}"
    return ""


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")
