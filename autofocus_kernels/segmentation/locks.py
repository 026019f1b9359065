"""Locks on files, which the kernel gives up when a process ends, however it ends.

Where there are none, on Windows and on some file systems, nothing is locked, and work goes on as if alone.
"""

from __future__ import annotations

from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock_file(file: IO) -> bool | None:
    """Locks an open file against every other opening of it; processes that are forked meanwhile hold it too.

    Returns:
        whether it is locked now: False if it was by somebody else, None where there are no locks.
    """
    return _try("flock", file)


def lock_process(file: IO) -> bool | None:
    """As :func:`lock_file`, against other processes: forked ones do not hold it, and may outlive this one."""
    return _try("lockf", file)


def _try(how: str, file: IO) -> bool | None:
    if fcntl is None:
        return None
    try:
        getattr(fcntl, how)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter of lockf on some systems
        return False
    except OSError:
        return None
    return True
