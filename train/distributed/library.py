"""Imports DeepSpeed without what it prints, and without anything that it would compile."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def library() -> Any:
    """DeepSpeed, imported on first use."""
    for name in ("torch.utils.cpp_extension", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed compiles its shared-memory collective at run time. A compiler that is killed leaves
    # a lock behind, on which every later run would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what DeepSpeed prints and warns about while it starts, saves and loads."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
