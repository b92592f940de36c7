"""Memory that a process has freed, kept for what it allocates next: for programs that draw on a CPU.

glibc hands every tensor above 32 MB back to the system as it dies, and smaller ones from the end of its heap. The next tensor's pages are
then mapped and zeroed one by one as they are first written, which takes a large part of a large picture's time (docs/adr/0009).
"""

from __future__ import annotations

import ctypes

KEPT = 2  # times the memory that a run needs: what to have for it to be kept, in pieces that do not fit each other
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """From now on, for the whole process, which grows larger by it. The command and the benchmarks decide so, the library never.

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
