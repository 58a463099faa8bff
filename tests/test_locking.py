"""One at a time may write into a folder."""

from __future__ import annotations

import errno
import os

import pytest

from attn_kd._locking import locked_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="folders cannot be locked")


def test_lock_is_refused_while_it_is_held_and_leaves_nothing(tmp_path):
    with locked_folder(tmp_path) as first:
        with locked_folder(tmp_path) as second:
            pass
        with locked_folder(tmp_path) as third:  # the refusal has not taken the lock from the first
            pass
    with locked_folder(tmp_path) as last:
        assert not any(tmp_path.iterdir())
    assert (first, second, third, last) == (True, False, False, True)


def test_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked_folder(tmp_path):
        raise RuntimeError
    with locked_folder(tmp_path) as is_mine:
        assert is_mine


def test_file_system_without_locks_hinders_nobody(tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked_folder(tmp_path) as is_mine:
        assert is_mine
