"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes its place, on failure it is gone.

    The temporary name keeps the suffix, since many writers choose their format by it. The parent
    folder must exist; ``OSError`` of the system passes through.
    """
    path = Path(path)
    temporary = path.parent / (_hidden_name(path.stem) + path.suffix)
    # Not tempfile: its files are private, and reading the umask to open them up sets it for an
    # instant, for all threads. Made like this they get the mode of any other file.
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder beside ``path``; on success it replaces the folder ``path``, if any.

    A folder cannot be replaced in one system call: for an instant, between two renames, ``path``
    does not exist. It is never there half-filled. What interrupts the exchange puts the old folder
    back; where even that fails it stays beside ``path``, as ``.NAME-…-old``.
    """
    path = Path(path)
    temporary = path.parent / _hidden_name(path.name)
    retired = path.parent / f"{temporary.name}-old"
    temporary.mkdir()
    try:
        yield temporary
        try:
            if path.exists():
                os.rename(path, retired)
            os.rename(temporary, path)
        except BaseException:  # Ctrl-C included: the old folder may be the only one
            if retired.exists() and not path.exists():
                os.rename(retired, path)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hidden_name(stem: str) -> str:
    return f".{stem}-{secrets.token_hex(8)}"
