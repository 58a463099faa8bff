"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from attn_kd._atomic import replacing_file, replacing_folder


def test_file_is_replaced(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    (tmp_path / "ordinary").touch()
    with replacing_file(tmp_path / "replaced"):
        pass
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_folder_has_the_permissions_of_an_ordinary_one(tmp_path):
    (tmp_path / "ordinary").mkdir()
    with replacing_folder(tmp_path / "replaced"):
        pass
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    changes = []
    monkeypatch.setattr(os, "umask", changes.append)
    with replacing_file(tmp_path / "file"), replacing_folder(tmp_path / "folder"):
        pass
    assert not changes


def test_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with replacing_folder(target) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), replacing_folder(target) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def old(tmp_path):
    """A folder with one file, to be replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    return folder


def replace(folder) -> None:
    with replacing_folder(folder) as temporary:
        (temporary / "new").touch()


def interrupt_rename(monkeypatch, which: int, error: BaseException, *, done: bool) -> None:
    """Raise from the given call of os.rename, before or after it has done its work."""
    rename, calls = os.rename, []

    def interrupted(source, target) -> None:
        calls.append(source)
        if len(calls) != which:
            return rename(source, target)
        if done:
            rename(source, target)
        raise error

    monkeypatch.setattr(os, "rename", interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")], ids=["ctrl-c", "os"])
@pytest.mark.parametrize(
    ("which", "done"),
    [(1, False), (1, True), (2, False)],
    ids=["before the first rename", "after the first", "before the second"],
)
def test_interrupted_exchange_leaves_the_old_folder(old, monkeypatch, which, done, error):
    interrupt_rename(monkeypatch, which, error, done=done)
    with pytest.raises(type(error)):
        replace(old)
    assert [path.name for path in old.iterdir()] == ["old"]
    assert list(old.parent.iterdir()) == [old]


def test_exchange_interrupted_at_its_end_leaves_the_new_folder(old, monkeypatch):
    interrupt_rename(monkeypatch, 2, KeyboardInterrupt(), done=True)
    with pytest.raises(KeyboardInterrupt):
        replace(old)
    assert [path.name for path in old.iterdir()] == ["new"]


def test_old_folder_is_kept_where_it_cannot_be_put_back(old, monkeypatch):
    rename = os.rename

    def overtaken(source, target) -> None:
        rename(source, target)
        if source == old:  # somebody else makes a folder of that name
            old.mkdir()
            (old / "foreign").touch()

    monkeypatch.setattr(os, "rename", overtaken)
    with pytest.raises(OSError):
        replace(old)
    assert {path.name for path in old.parent.rglob("*") if path.is_file()} == {"old", "foreign"}
