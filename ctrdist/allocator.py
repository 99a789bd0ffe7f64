"""Memory that libraries keep for later: as much as is used again, and no more."""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for what `mallopt(3)` sets."""

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
"""The same as environment variables, for a process of others."""


def keep_freed_memory() -> None:
    """Keep up to a GiB of freed memory in this process, large blocks too, for the next step to use.

    glibc otherwise returns it to the system after each step, and page by page gets it back: a fifth to a quarter of the
    time of a DIN step on a CPU (`benchmarks/train_step.py`). Environment variables such as `MALLOC_TRIM_THRESHOLD_`
    win; other C libraries are left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, size in zip((_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD), KEEP.values(), strict=True):
        mallopt(parameter, ctypes.c_int(int(size)))


def keep_few_kernels() -> None:
    """Keep 32 of oneDNN's kernels in this process, in place of 1,024; to be called before it computes anything.

    A kernel is for products of one shape. Texts by length bring new shapes at every step, so that hardly one is used
    again after it, while a training with a language model and 256 texts a step grew to 15 GiB; one with 64 texts took
    3.3 GiB after 30 steps, and 2.2 with 32 kernels, for 4 % more CPU time. Variables in the environment win.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and PyTorch's before it
        os.environ.setdefault(name, "32")
