"""What a run keeps beside its model: its settings and teacher, its checkpoints, its history."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from attn_kd._atomic import replacing_file
from attn_kd.errors import InputError
from attn_kd.training.config import TrainingConfig, read_json

RECORD_FILE = "training.json"
HISTORY_FILE = "history.json"
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
TENSORBOARD = "tensorboard"

# What belongs to a run, in its folder.
_RUN_ENTRIES = (
    CONFIG_FILE,
    "model.safetensors",
    "preprocessor_config.json",
    RECORD_FILE,
    HISTORY_FILE,
    TENSORBOARD,
    CHECKPOINTS,
)
_REPLACED = "replaced"  # among the checkpoints: the run that this one replaces

# transformers' names of what is logged at each step -> those of the history.
_HISTORY_FIELDS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "detection_loss": "detection_loss",
    "attention_kl": "attention_kl",
    "class_kl": "class_kl",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
}


@dataclass(frozen=True)
class TeacherIdentity:
    """Which teacher a student learns from: a folder, and the SHA-256 of the weights in it."""

    folder: str
    sha256: str

    @classmethod
    def of(cls, folder: str | os.PathLike) -> TeacherIdentity:
        """Identify the model folder of a teacher.

        Raises:
            InputError: there are no weights in it.
        """
        folder = Path(folder)
        try:
            with open(folder / "model.safetensors", "rb") as weights:
                digest = hashlib.sha256()
                while block := weights.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise InputError(
                f"teacher {folder} is not a model folder: {error.filename}: {error.strerror}"
            ) from None
        return cls(str(folder.resolve()), digest.hexdigest())

    @classmethod
    def from_json(cls, name: str, value: Any) -> TeacherIdentity | None:
        """The identity that a record has under ``name``; ``None`` where it is null.

        Raises:
            InputError: it is something else.
        """
        if value is None:
            return None
        fields = value if isinstance(value, Mapping) else {}
        if fields.keys() != {"folder", "sha256"} or {*map(type, fields.values())} != {str}:
            raise InputError(
                f"{name} is {reprlib.repr(value)}; expected null or an object of two strings, "
                "folder and sha256"
            )
        return cls(**fields)


@dataclass(frozen=True)
class RunRecord:
    """What makes a run the run it is; one that goes on must have the same.

    Attributes:
        config: the settings.
        teacher: ``None`` where there is none.
        data: :func:`~attn_kd.training.datasets.data_fingerprint` of the training split; ``None``
            where it is not known, as in records written before it was kept.
        teacher_cache: folder of the cache of the teacher that was trained from, and the SHA-256 of
            its content; ``None`` where the teacher ran.
    """

    config: TrainingConfig
    teacher: TeacherIdentity | None = None
    data: str | None = None
    teacher_cache: TeacherIdentity | None = None

    def to_dict(self) -> dict[str, Any]:
        teacher, cache = (
            None if identity is None else vars(identity)
            for identity in (self.teacher, self.teacher_cache)
        )
        record = {"config": self.config.to_dict(), "teacher": teacher, "data": self.data}
        return record if cache is None else {**record, "teacher_cache": cache}

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunRecord:
        """Read a record, of this version or an earlier one.

        Raises:
            InputError: the file is missing or broken, or a setting in it is refused; the message
                names the file.
        """
        values = read_json(path, dict)
        for name in ("config", "teacher"):
            if name not in values:
                raise InputError(f"{path} is no record of a training run: it has no {name!r}")
        try:
            config = TrainingConfig.from_dict(values["config"])
            teacher, cache = (
                TeacherIdentity.from_json(name, values.get(name))
                for name in ("teacher", "teacher_cache")
            )
            data = values.get("data")
            if not isinstance(data, (str, NoneType)):
                raise InputError(f"data is {reprlib.repr(data)}; expected a string or null")
            return cls(config, teacher, data, cache)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def require_continues(self, earlier: RunRecord, where: str | os.PathLike) -> None:
        """Check that this run, resumed, would go on with what ``earlier`` began.

        Raises:
            InputError: a setting, the teacher's weights, its cache or the training data differ; the
                first that does is named.
        """
        for name, (now, before) in self.config.differences(earlier.config).items():
            raise InputError(f"cannot resume {where}: {name} is {now!r}, it was {before!r}")
        for what, now, before in (
            ("teacher", self.teacher, earlier.teacher),
            ("teacher cache", self.teacher_cache, earlier.teacher_cache),
        ):
            if (now and now.sha256) != (before and before.sha256):
                raise InputError(
                    f"cannot resume {where}: the {what} is {_described(now)}, "
                    f"it was {_described(before)}"
                )
        if None not in (self.data, earlier.data) and self.data != earlier.data:
            raise InputError(
                f"cannot resume {where}: the training data has other images, boxes or classes than "
                "it was begun with"
            )


def _described(teacher: TeacherIdentity | None) -> str:
    return "none" if teacher is None else f"{teacher.folder} (sha256 {teacher.sha256[:12]}…)"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: the model when it is done, checkpoints until then."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def is_finished(self) -> bool:
        """A model folder's configuration is written last."""
        return (self.path / CONFIG_FILE).is_file() and not self.checkpoints.exists()

    @property
    def pretraining(self) -> Path:
        """Where checkpoints of the backbone's pretraining are, until it is done."""
        return self.checkpoints / "pretraining"

    @property
    def pretrained(self) -> Path:
        """Where the model is kept whose backbone has been pretrained, before the first step."""
        return self.checkpoints / "pretrained"

    @property
    def has_pretrained(self) -> bool:
        """Whether it is there; a model folder's configuration is written last."""
        return (self.pretrained / CONFIG_FILE).is_file()

    @property
    def has_progress(self) -> bool:
        """Whether there is anything that a resumed run could go on from."""
        folders = (self.pretraining, self.checkpoints)
        return self.has_pretrained or any(map(latest_checkpoint, folders))

    def require_free(self, *, overwrite: bool) -> None:
        """Check that a new run may begin here.

        Raises:
            InputError: the folder holds a run already and ``overwrite`` is not set.
        """
        if overwrite:
            return
        another = "--overwrite to replace it, or another folder"
        if (self.path / RECORD_FILE).exists():
            raise InputError(
                f"{self.path} already holds a training run; "
                f"expected --resume to go on with it, {another}"
            )
        if (self.path / CONFIG_FILE).exists():
            raise InputError(f"{self.path} already holds a model; expected {another}")

    def begin(self, record: RunRecord, *, overwrite: bool) -> None:
        """Make the folder ready for a new run.

        A run that it replaces is set aside, in the folder of checkpoints, until :meth:`finish`.

        Raises:
            InputError: the folder holds a run already and ``overwrite`` is not set.
        """
        self.require_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.checkpoints / _REPLACED, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=self.path))
        _move(_RUN_ENTRIES, self.path, aside)
        self.checkpoints.mkdir()
        aside.rename(self.checkpoints / _REPLACED)
        write_json(self.path / RECORD_FILE, record.to_dict())

    def withdraw(self) -> None:
        """Undo :meth:`begin`: what it replaced is back, and a folder with nothing else is gone."""
        aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=self.path))
        _move(_RUN_ENTRIES, self.checkpoints / _REPLACED, aside)
        for name in _RUN_ENTRIES:
            _remove(self.path / name)
        _move(_RUN_ENTRIES, aside, self.path)
        aside.rmdir()
        with contextlib.suppress(OSError):  # it holds other files
            self.path.rmdir()

    def begun(self) -> RunRecord:
        """The record of the run that is here.

        Raises:
            InputError: the folder holds none.
        """
        if not (self.path / RECORD_FILE).is_file():
            raise InputError(
                f"cannot resume {self.path}: it has no {RECORD_FILE}; no training was begun there"
            )
        return RunRecord.load(self.path / RECORD_FILE)

    def resume(self, record: RunRecord) -> Path | None:
        """The checkpoint to go on from; ``None`` where the run had not come to its first.

        Raises:
            InputError: the folder holds no run, or another one.
        """
        record.require_continues(self.begun(), self.path)
        return latest_checkpoint(self.checkpoints)

    def finish(self) -> None:
        """Throw the checkpoints away: the model is saved."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move those entries of a folder that exist."""
    for name in names:
        if (source / name).exists():
            (source / name).rename(target / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps; ``None`` where there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


def history_entries(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training and evaluation entries of a trainer's log, in the names of ``history.json``.

    A training entry has step, epoch, loss, detection_loss, lr, grad_norm and, with a teacher,
    attention_kl and class_kl; an evaluation entry has step, epoch and eval_* metrics.
    """
    entries = []
    for logged in log:
        metrics = {name: value for name, value in logged.items() if name.startswith("eval_")}
        if "loss" in logged or metrics:
            renamed = {
                name: logged[source] for source, name in _HISTORY_FIELDS.items() if source in logged
            }
            entries.append(renamed | metrics)
    return entries


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
