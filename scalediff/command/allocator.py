"""Keep freed memory in the process for later allocations, which speeds up generation on a CPU.

glibc returns tensors above 32 MB to the system when they are freed, and smaller ones at the end of its heap. The pages of the next tensor
are then mapped and zeroed on first write, which takes a large part of the time of a large picture (docs/adr/0009).
"""

from __future__ import annotations

import ctypes

MEMORY_HEADROOM = 2  # freed memory is kept if this many times a run's needs are available, because freed blocks are not always reusable
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory from now on, for the whole process, which then uses more memory.

    Only the command and the benchmarks call this; the library never does.

    Returns:
        Whether the system's allocator supports it, as glibc on Linux does.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  other libraries have a mallopt that does nothing
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
