"""Stages: what is done again and what is not."""

from __future__ import annotations

from functools import partial

import pytest

from attn_kd import InputError
from attn_kd.report.stages import Stages

SETTINGS = {"seed": 0}


class Log:
    """Stages of a folder whose work is to note that it was done."""

    def __init__(self, folder, *, settings=None, **how):
        self.done = []
        self.stages = Stages(
            folder, settings or SETTINGS, announce=lambda name, skipped: None, **how
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


def test_overwriting_does_all_again(tmp_path):
    Log(tmp_path).run("a", "b")
    again = Log(tmp_path, overwrite=True)
    again.run("a", "b")
    assert again.done == ["a", "b"]


def test_what_follows_a_stage_that_is_done_again_is_stale(tmp_path):
    Log(tmp_path).run("a", "b")
    Log(tmp_path, overwrite=True).run("a")  # and is then interrupted
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


@pytest.mark.parametrize("file", ["settings.json", "stages/a.json"])
@pytest.mark.parametrize("text", ['{"seed"', "[]", ""], ids=["cut", "list", "empty"])
def test_resuming_with_a_broken_file_names_it(file, text, tmp_path):
    Log(tmp_path).run("a")
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=file):
        Log(tmp_path, resume=True).run("a")


def test_earlier_run_is_not_overwritten_unasked(tmp_path):
    results = Log(tmp_path).run("a")
    with pytest.raises(InputError, match="earlier run"):
        Log(tmp_path)
    assert Log(tmp_path, resume=True).run("a") == results


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "settings.json"])
def test_foreign_folder_is_left_alone(name, overwrite, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="other files"):
        Log(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_new_folder_is_made_with_its_parents(tmp_path):
    assert Log(tmp_path / "new" / "out").run("a")
