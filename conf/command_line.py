"""Settings as people type them, before Hydra reads them: paths need no quotes of Hydra's.

A shell takes away the outer quotes of `name=value`, and Hydra reads what is left by a grammar in
which `=`, `(`, `#`, `,`, `~`, letters with accents and `2024_01` are no plain text.
"""

import re
import shlex
import sys
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

SPELLING = (
    "write name=value, and quote what has spaces, brackets or commas: "
    "ARGS=\"'panel.voters=[clip, hps]'\" for make, 'panel.voters=[clip, hps]' for python"
)
"""How a setting is written on the command line."""


def as_text(arguments: Sequence[str], owner: type) -> list[str]:
    """The arguments with Hydra's quotes around the value of each setting that is a text.

    `owner` is the dataclass of all settings.
    """
    return [_quoted_value(argument, owner) for argument in arguments]


def _quoted_value(argument: str, owner: type) -> str:
    name, equals, value = argument.partition("=")
    quotes_itself = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not value or value == "null" or quotes_itself or not is_text(name, owner):
        return argument
    return f"{name}{equals}{quoted(value)}"


def is_text(name: str, owner: type) -> bool:
    """Whether a setting's value is a text: a path, a name, a commit."""
    kind: Any = owner
    for part in name.lstrip("+").split("."):
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return False
    if get_origin(kind) in (Union, types.UnionType):
        return str in get_args(kind)
    return kind is str


def quoted(value: str) -> str:
    """A value in Hydra's quotes."""
    mark = "'" if '"' in value and "'" not in value else '"'
    escaped = re.sub(rf"(\\*){mark}", lambda match: match[1] * 2 + "\\" + mark, value)
    escaped = re.sub(r"\\+$", lambda match: match[0] * 2, escaped)
    return f"{mark}{escaped}{mark}"


def spelling(argument: str) -> str:
    """What to type instead of an argument that cannot be read, for python and for make."""
    name, equals, value = argument.partition("=")
    if not equals and (before := _argument_before(argument)):
        return f"if it belongs to {before}, type {_typed(f'{before} {argument}')}"
    if not equals or not re.fullmatch(r"[+~\w.@/-]+", name) or value[:1] in ("[", "{"):
        return SPELLING
    return f"if its value is a text, type {_typed(f'{name}={quoted(value)}')}"


def _argument_before(argument: str) -> str:
    """The setting that a shell may have cut an argument off."""
    arguments = sys.argv[1:]
    at = arguments.index(argument) if argument in arguments else 0
    return re.sub(r"=([\"'])(.*)\1$", r"=\2", arguments[at - 1]) if at else ""


def _typed(argument: str) -> str:
    """An argument in the shell's quotes, as it is typed for python and for make."""
    return f"{shlex.quote(argument)} for python, ARGS={for_make(argument)} for make"


def for_make(argument: str) -> str:
    """An argument as the value of ARGS: in quotes for make's shell, and again for one's own."""
    inner = shlex.quote(argument).replace("$", "$$")
    return '"' + re.sub(r'([\\"$`])', r"\\\1", inner) + '"'
