"""Keep memory that is used again: glibc gives every large block back to the kernel, which must clear it anew each time."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h
TOP_PAD = 100_000_000  # bytes asked of the kernel beyond what is needed


def keep_pages() -> bool:
    """Let this process keep freed memory and take large blocks from it; return whether the C library understood.

    Activations of a pass are as large as those of the pass before, so what is kept is used. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD)))
