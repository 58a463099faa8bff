"""Folders that one process at a time may write into."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike) -> Iterator[bool]:
    """Hold the lock of an existing folder; yield False at once where somebody else holds it.

    The system takes the lock back when its holder ends, however it does; nothing is left in the
    folder. Where folders cannot be locked (Windows, some network file systems) everybody gets it.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl  # of POSIX systems alone

    folder = os.open(path, os.O_RDONLY)
    is_mine = True
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        except OSError:  # it cannot be locked
            pass
        yield is_mine
    finally:
        os.close(folder)
