"""Memory that a process has freed, kept for what it allocates next: for programs that draw on a CPU.

glibc hands every tensor above 32 MB back to the system as it dies, and smaller ones from the end of its heap. The next tensor's pages are
then mapped and zeroed one by one as they are first written, which took half the time of a large picture (docs/adr/0009).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """From now on, for the whole process. It is for the program to decide: the command and the benchmarks do, the library never.

    Returns:
        Whether the system's allocator can: glibc's, on Linux.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  other libraries have a mallopt that does nothing
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
