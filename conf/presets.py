"""`+preset=24gb`: settings by the memory of a GPU, a file for each model in `conf/preset/`."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "preset"
CHOICE = re.compile(r"\+*preset(?:/(\w+))?=(['\"]?)(.*)\2")


def with_preset(
    arguments: Sequence[str], chosen_model: Callable[[Sequence[str]], str]
) -> list[str]:
    """The arguments with `+preset=24gb` as the chosen model's file, `+preset/sdxl=24gb`.

    `chosen_model` gives the choice of the group `model` among the other arguments: an experiment
    may have made it.

    Raises:
        ValueError: The model has no presets, or none of this name, and says which there are; there
            are several; or it is another model's, or of another tuning than is typed.
    """
    choices = [match for argument in arguments if (match := CHOICE.fullmatch(argument))]
    if not choices:
        return list(arguments)
    if len(choices) > 1:
        given = " and ".join(match[0] for match in choices)
        raise ValueError(f"{given} are several presets; give one")
    others = [argument for argument in arguments if not CHOICE.fullmatch(argument)]
    model = chosen_model([argument for argument in others if _is_setting(argument)])
    path = _file(model, *choices[0].group(1, 3))
    _check_tuning(path, others)
    return [*others, f"+preset/{model}={path.stem}"]


def _file(model: str, owner: str | None, name: str) -> Path:
    """The file of a preset, for the chosen model; `owner` is the model that was typed with it."""
    models = sorted(path.name for path in FOLDER.iterdir())
    if model not in models:
        raise ValueError(
            f"preset={name} has no settings for model={model}; there are some for "
            f"{', '.join(models)}. For another checkpoint choose the model that it is like, as in "
            "model=sdxl model.path=/models/mine"
        )
    if owner not in (None, model):
        raise ValueError(
            f"preset/{owner}={name} is for model={owner}, but the model is {model}; write "
            f"+preset={name}, which takes the chosen model's"
        )
    sizes = sorted(path.stem for path in (FOLDER / model).iterdir())
    if name not in sizes and list(FOLDER.glob(f"*/{name}.yaml")):
        raise ValueError(
            f"there is no preset={name} for model={model}, which does not fit there even with its "
            f"base in 4 bits and one pair at a time; allowed: {', '.join(sizes)}"
        )
    if name not in sizes:
        near = difflib.get_close_matches(name, sizes, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"unknown preset {name!r} for model={model}; {hint}allowed: {', '.join(sizes)}"
        )
    return FOLDER / model / f"{name}.yaml"


def _check_tuning(path: Path, others: Sequence[str]) -> None:
    """Refuse the learning rate of an adapter for all weights, and the other way around."""
    typed = dict(argument.lstrip("+").split("=", 1) for argument in others if "=" in argument)
    tuning = typed.get("tuning")
    if tuning and "train.lr" not in typed and f"/tuning: {tuning}" not in path.read_text():
        raise ValueError(
            f"tuning={tuning} is not what preset={path.stem} trains ({_words(path)}) and has the "
            "learning rate for; give train.lr, too, or leave one of the two out"
        )


def about(arguments: Sequence[str]) -> str:
    """The file that `with_preset` chose, and what it says of itself; empty if there is none."""
    for argument in arguments:
        if match := CHOICE.fullmatch(argument):
            path = FOLDER / match[1] / f"{match[3]}.yaml"
            return f"preset: {path.relative_to(FOLDER.parent.parent)}: {_words(path)}"
    return ""


def _words(path: Path) -> str:
    return path.read_text().splitlines()[1].removeprefix("# ")


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")
