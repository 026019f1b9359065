"""A lock on a file. The operating system releases it when the process ends, however it ends."""

from __future__ import annotations

from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(file: IO) -> bool:
    """Locks an open file against other processes: False if one of them holds it.

    Forked processes do not hold it, since those that make crops may outlive a killed training for seconds. Where there
    are no locks, on Windows and on some file systems, this locks nothing and returns True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some systems
        return False
    except OSError:
        pass
    return True
