"""Versions of a bundle that somebody reads stay until he is done: by locks on their folders.

Who reads holds a shared lock, and who writes takes away only what he can lock alone. Locks end with their process.
Where the file system has none, a version is taken away while it is read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from pathlib import Path


class Hold:
    """A folder that `remove_if_free` leaves alone, until this is closed or nobody has it any more.

    Args:
        folder: It. Waits while somebody removes it.

    Raises:
        OSError: It is not there, or cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.close = weakref.finalize(self, os.close, descriptor)
        self._folder = folder
        self._descriptor = descriptor
        _lock(descriptor, fcntl.LOCK_SH)

    @property
    def is_there(self) -> bool:
        """Whether the folder was not removed before it was held."""
        try:
            return os.path.samestat(self._folder.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


def remove_if_free(folder: Path) -> None:
    """Remove a folder that nobody holds; what cannot be removed stays."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """False where somebody else has the lock; True also where there are no locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
