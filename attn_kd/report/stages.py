"""Work in stages whose results stay on disk, so that an interrupted run can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attn_kd.errors import InputError
from attn_kd.training.config import read_json
from attn_kd.training.records import write_json


class Stages:
    """Stages in a fixed order, each with a record ``stages/NAME.json`` when it is done.

    Args:
        folder: where the records are kept, in ``stages/`` and ``settings.json``.
        settings: what the results depend on; must be the same when a run goes on.
        resume: skip the stages that are done. Without it all begin anew.
        overwrite: begin anew even where stages were done before.
        announce: called with the name of each stage and whether it is skipped.

    Raises:
        InputError: ``resume``, but nothing was begun here, or with other settings, or a file is
            broken; or neither ``resume`` nor ``overwrite``, and the folder is not empty; or
            ``overwrite``, and it holds something else.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        announce: Callable[[str, bool], None],
    ) -> None:
        self._records = folder / "stages"
        self._resume = resume
        self._announce = announce
        settings_file = folder / "settings.json"
        settings = json.loads(json.dumps(settings))  # as they will be read back
        if resume:
            _require_same(settings, settings_file)
        elif folder.exists():
            _require_free(folder, overwrite=overwrite)
        self._records.mkdir(parents=True, exist_ok=True)
        self._kept: set[Path] = set()
        if not resume:
            self._forget_later_stages()
        write_json(settings_file, settings)

    def run(self, name: str, work: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
        """The result of stage ``name``: ``work(resume)``, or what it gave when it was last run.

        When a stage is run, so are all later ones. ``work`` is told whether it may go on with what
        an interrupted run of itself has left. ``seconds`` is added to its result.
        """
        record = self._records / f"{name}.json"
        done = record.exists()
        self._announce(name, done)
        self._kept.add(record)
        if done:
            return read_json(record, dict)
        may_go_on, self._resume = self._resume, False
        self._forget_later_stages()
        started = time.perf_counter()
        result = {**work(may_go_on), "seconds": round(time.perf_counter() - started, 1)}
        write_json(record, result)
        return result

    def _forget_later_stages(self) -> None:
        for record in self._records.glob("*.json"):
            if record not in self._kept:
                record.unlink()


def _require_free(folder: Path, *, overwrite: bool) -> None:
    begun = (folder / "settings.json").is_file() and (folder / "stages").is_dir()
    if begun and not overwrite:
        raise InputError(
            f"{folder} holds an earlier run; expected --resume to go on with it, --overwrite to "
            "replace it, or another folder"
        )
    if not begun and any(folder.iterdir()):
        raise InputError(f"{folder} holds other files; expected an empty or a new folder")


def _require_same(settings: dict[str, Any], file: Path) -> None:
    if not file.exists():
        raise InputError(f"cannot resume in {file.parent}: nothing was begun there")
    before = read_json(file, dict)
    for name in sorted(settings.keys() | before.keys()):
        if settings.get(name) != before.get(name):
            raise InputError(
                f"cannot resume in {file.parent}: {name} is {settings.get(name)!r}, "
                f"it was {before.get(name)!r}"
            )
