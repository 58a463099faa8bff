"""Stages: what is done again and what is not."""

from __future__ import annotations

from functools import partial

import pytest

from attn_kd import InputError
from attn_kd.report.stages import Stages

SETTINGS = {"seed": 0}


class Log:
    """Stages of a folder whose work is to note that it was done."""

    def __init__(self, folder, *, resume=False, settings=None):
        self.done = []
        self.stages = Stages(
            folder, settings or SETTINGS, resume=resume, announce=lambda name, skipped: None
        )

    def run(self, *names):
        return [self.stages.run(name, partial(self._note, name)) for name in names]

    def _note(self, name, may_go_on):
        self.done.append(name)
        return {"name": name}


def test_resuming_skips_what_is_done_and_gives_its_result(tmp_path):
    first = Log(tmp_path)
    results = first.run("a", "b")
    again = Log(tmp_path, resume=True)
    assert again.run("a", "b", "c")[:2] == results
    assert again.done == ["c"]


def test_without_resume_all_is_done_again(tmp_path):
    Log(tmp_path).run("a", "b")
    again = Log(tmp_path)
    again.run("a", "b")
    assert again.done == ["a", "b"]


def test_what_follows_a_stage_that_is_done_again_is_stale(tmp_path):
    Log(tmp_path).run("a", "b")
    Log(tmp_path).run("a")  # and is then interrupted
    last = Log(tmp_path, resume=True)
    last.run("a", "b")
    assert last.done == ["b"]


def test_stage_that_fails_is_not_done(tmp_path):
    def fail(may_go_on):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Log(tmp_path).stages.run("a", fail)
    again = Log(tmp_path, resume=True)
    again.run("a")
    assert again.done == ["a"]


def test_only_the_interrupted_stage_may_go_on(tmp_path):
    Log(tmp_path).run("a")
    told = []
    stages = Log(tmp_path, resume=True).stages
    for name in ("a", "b", "c"):
        stages.run(name, lambda may_go_on: told.append(may_go_on) or {})
    assert told == [True, False]


def test_other_settings_are_named(tmp_path):
    Log(tmp_path, settings={"seed": 0})
    with pytest.raises(InputError, match="seed is 1, it was 0"):
        Log(tmp_path, settings={"seed": 1}, resume=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing was begun"):
        Log(tmp_path, resume=True)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="other files"):
        Log(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
