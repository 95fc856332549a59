"""What the columns and keys of a pair set may hold, checked and cast here for every layout.

A column's type is checked from the file's schema, before any weight is loaded; values that a type
does not exclude, such as a choice of 7, are checked where they are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from data.pairs.config import Images
from data.pairs.schema import PairsError

LONGEST_SHOWN = 60
"""Characters of a value that a message shows."""
CHOICE_MEANING = (
    "a human choice is 1 for image 0, 0 for image 1, 0.5 for a tie, null where nobody chose: "
    "rewrite the column, or leave pairs.columns.human empty"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a column holds."""

    needed: str
    """Completes "must be"."""
    wanted: pa.DataType
    """What it is cast to."""
    fits: Callable[[pa.DataType], bool]
    """Whether a column of this type can be cast; nulls can always."""
    python: tuple[type, ...]
    """Types of its JSON values; null always."""


def _is_text(kind: pa.DataType) -> bool:
    return any((types.is_string(kind), types.is_large_string(kind), types.is_string_view(kind)))


def _is_bytes(kind: pa.DataType) -> bool:
    variable = (types.is_binary(kind), types.is_large_binary(kind), types.is_binary_view(kind))
    return any((*variable, types.is_fixed_size_binary(kind)))


def _is_number(kind: pa.DataType) -> bool:
    return any((types.is_integer(kind), types.is_floating(kind), types.is_decimal(kind)))


TEXT = Kind("text", pa.string(), _is_text, (str,))
NAME = Kind(
    "text or a whole number", pa.string(), lambda k: _is_text(k) or types.is_integer(k), (str, int)
)
IMAGE = Kind("encoded bytes", pa.binary(), _is_bytes, (str,))
"""In JSON base64."""
CHOICE = Kind(
    "a number (1 for image 0, 0 for image 1, 0.5 for a tie, null where nobody chose)",
    pa.float32(),
    lambda k: _is_number(k) or types.is_boolean(k),
    (bool, int, float),
)
FLAG = Kind(
    "true or false, or 1 or 0",
    pa.bool_(),
    lambda k: types.is_boolean(k) or types.is_integer(k),
    (bool, int),
)
RANK = Kind("a number", pa.float64(), _is_number, (int, float))


def kinds_of(images: Images) -> dict[str, Kind]:
    """Our words and what the columns behind them hold."""
    image = IMAGE if images is Images.inline else TEXT
    sided = {"uid": NAME, "generator": NAME, "image": image}
    both = {f"{word}_{side}": kind for word, kind in sided.items() for side in (0, 1)}
    return {"prompt": TEXT, "human": CHOICE, "known": FLAG} | both


# --- columns -------------------------------------------------------------------------------------


def check_types(
    where: str,
    schema: pa.Schema,
    columns: Mapping[str, str],
    kinds: Mapping[str, Kind],
    *,
    mapped: bool = False,
) -> None:
    """Refuse a file with a column of another type than its kind, or with two of one name.

    `columns` maps our words to those of the file, as `pairs.columns` does where it is `mapped`.

    Raises:
        PairsError: Names the column, its type, and what it must be.
    """
    for ours, name in columns.items():
        if (count := schema.names.count(name)) > 1:
            raise PairsError(f"{where} has {count} columns {name}; rename or remove one")
        if count == 0:
            continue
        kind, actual = kinds[ours], schema.field(name).type
        plain = plain_type(actual)
        if not (types.is_null(plain) or kind.fits(plain)):
            other = f", or name another column (pairs.columns.{ours}=...)" if mapped else ""
            raise PairsError(
                f"{where}: column {name} is {shown_type(actual)}, but {ours} must be {kind.needed}"
                f"; {_advice(kind, plain, mapped)}{other}"
            )


def _advice(kind: Kind, actual: pa.DataType, mapped: bool) -> str:
    if kind is IMAGE and (types.is_list(actual) or types.is_large_list(actual)):
        return "write each image as one value of bytes (pa.binary()), not as a list of numbers"
    if kind is IMAGE and _is_text(actual) and mapped:
        return "set pairs.images=paths if they are paths"
    if kind is TEXT and _is_bytes(actual) and mapped:
        return "set pairs.images=inline if they are images as bytes"
    return "convert the column"


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary, an extension, or Hugging Face's {bytes, path}."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return plain_type(kind.field("bytes").type)
    return kind


def cast_column(where: str, name: str, column: pa.ChunkedArray, kind: Kind, first_row: int = 0) -> (
    pa.ChunkedArray
):  # fmt: skip
    """A column in the type of its kind, whose rows count from `first_row`.

    Raises:
        PairsError: A value is outside the range; names column, row and value.
    """
    column = _plain(column)
    if kind is CHOICE and not types.is_null(column.type):
        numbers = column.cast(pa.float64(), safe=False)
        numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
        outside = pc.or_(pc.less(numbers, 0), pc.greater(numbers, 1))
        _refuse_first(where, name, column, outside, first_row, CHOICE_MEANING)
        return numbers.cast(kind.wanted, safe=False)
    if kind is FLAG and types.is_integer(column.type):
        outside = pc.invert(pc.is_in(column, pa.array([0, 1, None], column.type)))
        _refuse_first(where, name, column, outside, first_row, f"it must be {kind.needed}")
    return valid_text(column.cast(kind.wanted))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a dictionary, an extension, or Hugging Face's {bytes, path}."""
    while plain_type(column.type) != column.type:
        if isinstance(column.type, pa.BaseExtensionType):
            chunks = [chunk.storage for chunk in column.chunks]
            column = pa.chunked_array(chunks, column.type.storage_type)
        elif types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        else:
            column = pc.struct_field(column, "bytes")
    return column


def _refuse_first(
    where: str, name: str, column: pa.ChunkedArray, outside: Any, first_row: int, meaning: str
) -> None:
    row = pc.index(outside, True).as_py()  # noqa: FBT003
    if row >= 0:
        raise PairsError(
            f"{where}: column {name} has {shown(column[row].as_py())} in row {first_row + row}; "
            f"{meaning}"
        )


def valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text with U+FFFD where it is no UTF-8, so that its row is kept; other columns as they are.

    Parquet promises UTF-8, but no reader looks at it before Python does.
    """
    if not _is_text(column.type):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        texts = (text.as_py() for text in column.cast(pa.large_binary()))
        replaced = [None if text is None else text.decode("utf-8", "replace") for text in texts]
        return pa.chunked_array([pa.array(replaced, column.type)])
    return column


# --- JSON values ---------------------------------------------------------------------------------


def json_value(where: str, key: str, value: Any, kind: Kind) -> Any:
    """A value of a JSON object in the type of its kind; null stays null.

    Raises:
        PairsError: It has another type or is outside the range; begins with `where`.
    """
    if value is None or value != value:  # NaN, which JSON has not and Python's parser takes
        return None
    fits = isinstance(value, kind.python) and (not isinstance(value, bool) or bool in kind.python)
    if kind is CHOICE and isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise PairsError(f"{where}: {key} has {shown(value)}; {CHOICE_MEANING}")
    if not fits or (kind is FLAG and value not in (0, 1)):
        raise PairsError(
            f"{where}: {key} has {shown(value)}, but it must be {kind.needed}, or null"
        )
    if kind is FLAG:
        return bool(value)
    if kind in (CHOICE, RANK):
        return float(value) if abs(value) < 2**1000 else value
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()  # half a surrogate, which Arrow refuses, is ?


def shown(value: Any) -> str:
    """A value for a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def shown_type(kind: pa.DataType) -> str:
    """A type for a message, not longer than a line."""
    text = " ".join(str(kind).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
