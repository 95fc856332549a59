"""Packages that only some settings need."""

from importlib.util import find_spec


def check_bitsandbytes(what: str, otherwise: str) -> None:
    """Check that bitsandbytes is there for the setting `what`; `otherwise` is one to choose.

    Raises:
        ValueError: It is not installed; says how to install it.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{what} needs the package bitsandbytes, which is not installed: `.venv/bin/uv pip "
            f"install --python .venv/bin/python bitsandbytes`, or choose {otherwise}"
        )
