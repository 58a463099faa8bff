"""A cache is complete or says so, and goes on where its complete shards end."""

import dataclasses
import json
import os

import pytest

from attn_kd.errors import InputError
from attn_kd.training import TeacherCache, teacher_cache_writer
from attn_kd.training.teacher_cache_writer import write_cache


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def make(tiny_cache, tmp_path):
    """Writes, or completes, a copy of a cache: 12 images in shards of 5, 5 and 2.

    Returns the cache and the images that it had to compute.
    """

    def make(stop_at=None, overwrite=False, **changes):
        computed = []

        def record(index, view):
            if index == stop_at:
                raise KeyboardInterrupt
            computed.append(index)
            return tiny_cache.read(index, view)

        recipe = dataclasses.replace(tiny_cache.recipe, **changes)
        files = {"config.json": b"{}"}
        cache = write_cache(tmp_path / "cache", recipe, files, record, overwrite=overwrite)
        return cache, computed

    return make


def test_shards_hold_a_fixed_number_of_images(make):
    cache, computed = make()
    assert computed == list(range(12))
    assert [len(shard.grids) for shard in cache.shards] == [5, 5, 2]
    assert {path.name for path in cache.folder.iterdir()} == {
        "manifest.json",
        "teacher",
        *(f"shard-0000{number}.safetensors" for number in range(3)),
    }


def test_interrupted_cache_is_not_taken_for_a_complete_one(make, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="the same command goes on after 5 of 12 images"):
        make(stop_at=7)
    with pytest.raises(InputError, match=r"is no complete teacher cache: it has no manifest\.json"):
        TeacherCache.open(tmp_path / "cache")


def test_interrupted_cache_goes_on_where_complete_shards_end(make, tiny_cache):
    with pytest.raises(KeyboardInterrupt):
        make(stop_at=7)
    cache, computed = make()
    assert computed == list(range(5, 12))
    assert contents(cache.folder) == contents(tiny_cache.folder)
    assert cache.shards == tiny_cache.shards


def test_log_line_that_was_cut_short_does_not_count(make, tiny_cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(stop_at=11)
    log = tmp_path / "cache" / "shards.jsonl"
    log.write_text(log.read_text()[:-20])
    cache, computed = make()
    assert computed == list(range(5, 12))
    assert cache.shards == tiny_cache.shards


def test_log_line_that_is_no_text_does_not_count(make, tiny_cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(stop_at=11)
    with open(tmp_path / "cache" / "shards.jsonl", "ab") as log:
        log.write(b'{"file": "sh\xff\xfe')
    cache, computed = make()
    assert computed == [10, 11]
    assert cache.shards == tiny_cache.shards


def test_shard_that_is_listed_with_too_few_grids_is_computed_anew(make, tiny_cache, tmp_path):
    make()
    file = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][1]["grids"].pop()
    file.write_text(json.dumps(manifest))
    cache, computed = make()
    assert computed == list(range(5, 10))
    assert cache.shards == tiny_cache.shards


@pytest.mark.parametrize("content", ['{"recipe": {"images": 3}}', "[]", "{"], ids=str)
def test_damaged_recipe_is_named(make, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        make(stop_at=7)
    (tmp_path / "cache" / "unfinished.json").write_text(content)
    with pytest.raises(InputError, match=r"unfinished\.json (is|holds)"):
        make()


def test_damaged_shard_of_a_complete_cache_is_computed_anew(make, tiny_cache, tmp_path):
    make()
    damage(tmp_path / "cache" / "shard-00001.safetensors")
    cache, computed = make()
    assert computed == list(range(5, 10))
    assert contents(cache.folder) == contents(tiny_cache.folder)


def test_teacher_elsewhere_is_the_same_teacher(make, tiny_cache):
    make()
    moved = dataclasses.replace(tiny_cache.recipe.teacher, folder="/elsewhere")
    assert make(teacher=moved)[1] == []


def test_what_a_killed_run_was_writing_is_removed(make, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(stop_at=7)
    (tmp_path / "cache" / ".shard-00001-0123456789abcdef.safetensors").write_bytes(b"half")
    cache, _ = make()
    assert not any(path.name.startswith(".") for path in cache.folder.iterdir())


class Killed(BaseException):
    """Nobody expects it."""


@pytest.fixture
def kill_after(monkeypatch):
    """Lets so many files be written, and then, if asked, half of another one."""

    def kill_after(writes, *, half):
        left = iter(range(writes))
        write = teacher_cache_writer._write

        def limited(path, content):
            if next(left, None) is None:
                if half:
                    hidden = f".{path.stem}-0123456789abcdef{path.suffix}"
                    path.parent.mkdir(exist_ok=True)
                    (path.parent / hidden).write_bytes(content[: len(content) // 2])
                raise Killed
            write(path, content)

        monkeypatch.setattr(teacher_cache_writer, "_write", limited)

    yield kill_after
    monkeypatch.undo()


@pytest.mark.parametrize("half", [False, True], ids=["between files", "within a file"])
@pytest.mark.parametrize("replaced", [False, True], ids=["new folder", "over another cache"])
@pytest.mark.parametrize("writes", range(6))  # recipe, teacher, shards and manifest
def test_killed_run_goes_on_after_every_write(
    make, tiny_cache, kill_after, monkeypatch, writes, replaced, half
):
    if replaced:
        make(images_per_shard=12)
    kill_after(writes, half=half)
    with pytest.raises(Killed):
        make(overwrite=replaced)
    monkeypatch.undo()
    cache, _ = make(overwrite=replaced)
    cache.verify()
    assert contents(cache.folder) == contents(tiny_cache.folder)
    assert cache.shards == tiny_cache.shards
    assert {path.name for path in (cache.folder / "teacher").iterdir()} == {"config.json"}
    assert not any(path.name.startswith(".") for path in cache.folder.iterdir())


@pytest.mark.parametrize("writes", range(6))
def test_killed_run_can_be_replaced_after_every_write(make, kill_after, monkeypatch, writes):
    kill_after(writes, half=False)
    with pytest.raises(Killed):
        make()
    monkeypatch.undo()
    cache, _ = make(images_per_shard=12, overwrite=True)
    cache.verify()
    assert set(contents(cache.folder)) == {"shard-00000.safetensors"}


def test_files_of_another_teacher_do_not_stay(make, tmp_path):
    make()
    stale = tmp_path / "cache" / "teacher" / "training.json"
    stale.write_text("{}")
    cache, _ = make(images_per_shard=12, overwrite=True)
    assert [path.name for path in cache.teacher_folder().iterdir()] == ["config.json"]


@pytest.mark.parametrize("stop_at", [None, 7], ids=["complete", "interrupted"])
def test_another_cache_is_replaced_only_when_asked(make, stop_at):
    try:
        make(stop_at=stop_at)
    except KeyboardInterrupt:
        assert stop_at is not None
    other = {"images_per_shard": 12, "amp": "bf16"}
    with pytest.raises(InputError, match="another teacher cache: amp is 'bf16', it was 'none'"):
        make(**other)
    cache, computed = make(**other, overwrite=True)
    assert computed == list(range(12))
    assert set(contents(cache.folder)) == {"shard-00000.safetensors"}
    cache.verify()


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be locked")
def test_second_writer_at_once_is_refused_and_the_first_goes_on(make, tiny_cache, tmp_path):
    folder, files = tmp_path / "cache", {"config.json": b"{}"}
    refusals = []

    def record(index, view):
        if index == 6:
            with pytest.raises(InputError, match="another process is writing a teacher cache"):
                write_cache(folder, tiny_cache.recipe, files, tiny_cache.read, overwrite=True)
            refusals.append(index)
        return tiny_cache.read(index, view)

    write_cache(folder, tiny_cache.recipe, files, record).verify()
    assert refusals == [6]
    assert make()[1] == []  # the lock is free again


def test_folder_of_something_else_is_left_alone(make, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no teacher cache"):
        make(overwrite=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.tex"]
