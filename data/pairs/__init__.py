"""Pairs of images, from whatever layout they lie in on disk.

Every source yields the same columns (`PAIR`), batch by batch with bounded memory, in the order of
its files. A pair is named by what it is (`pair_key`), not by where it lies. A layout is a module
with a function `open_layout(spec: PairsSpec) -> PairSource`, in this folder or anywhere else.
"""

import difflib
import pkgutil
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from data.pairs.config import PairsSpec
from data.pairs.schema import PairsError, PairSource

OPEN = "open_layout"
"""The function that makes a module a layout."""


def open_pairs(spec: PairsSpec) -> PairSource:
    """Open a pair set and check that it has what is needed, before any weight is loaded.

    Raises:
        StoreError: There is no such folder, or no way to it.
        PairsError: No such layout, no files, a missing column, or no rows.
    """
    if not spec.root:
        raise PairsError("pairs.root is empty; give the folder of the pair files")
    opener = find_layout(spec.kind)
    _check_options(spec, opener)
    source = opener(spec)
    if not isinstance(source, PairSource):
        raise PairsError(
            f"pairs.kind={spec.kind}: {OPEN} gave {type(source).__name__}, which lacks methods of "
            "data.pairs.schema.PairSource"
        )
    if not sum(shard.rows for shard in source.shards):
        raise PairsError(f"the files of split {spec.split!r} under {spec.root} hold no pairs")
    return source


def find_layout(kind: str) -> Callable[[PairsSpec], Any]:
    """The function that opens a layout: of this folder by its name, of others by the full name.

    Raises:
        PairsError: There is no such module, or it is no layout; names those there are.
    """
    own = "." in kind
    try:
        module = import_module(kind if own else f"{__name__}.{kind}")
    except (ImportError, TypeError) as error:  # TypeError: a name that begins with a dot
        problem = f"cannot be imported ({error})" if own else "is no layout"
        raise PairsError(_refusal(kind, problem)) from error
    if not hasattr(module, OPEN):
        raise PairsError(_refusal(kind, f"has no function {OPEN}" if own else "is no layout"))
    opener: Callable[[PairsSpec], Any] = getattr(module, OPEN)
    return opener


def _check_options(spec: PairsSpec, opener: Callable[[PairsSpec], Any]) -> None:
    """Refuse options that a layout of this folder does not read, as its `OPTIONS` says."""
    if "." in spec.kind:
        return
    known = getattr(sys.modules[opener.__module__], "OPTIONS", ())
    if unread := sorted(spec.options.keys() - {*known}):
        raise PairsError(
            f"pairs.options.{unread[0]} is not read by pairs.kind={spec.kind}, which reads "
            f"{', '.join(known) or 'no options'}; leave it out"
        )


def built_in_kinds() -> list[str]:
    """The layouts of this folder."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(import_module(f"{__name__}.{name}"), OPEN)]


def _refusal(kind: str, problem: str) -> str:
    kinds = built_in_kinds()
    near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"pairs.kind={kind} {problem}; {hint}allowed are {', '.join(kinds)}, or a module of your "
        f"own with a function {OPEN} by its full name (pairs.kind=my_package.my_layout; "
        "docs/pairs.md)"
    )
