"""Writes a teacher cache, shard by shard; an interrupted run goes on where complete shards end.

Every file is written beside its place, flushed to the disk and renamed. While the cache is not
complete its recipe stands in ``unfinished.json`` and the checksum of every complete shard in
``shards.jsonl``, a line each; the manifest replaces both in the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from attn_kd._atomic import replacing_file
from attn_kd._locking import locked_folder
from attn_kd.errors import InputError
from attn_kd.training.config import read_json
from attn_kd.training.teacher_cache import TeacherCache
from attn_kd.training.teacher_cache_format import (
    FORMAT,
    MANIFEST_FILE,
    TEACHER_FOLDER,
    VERSION,
    CacheRecipe,
    Grid,
    ImageRecord,
    Shard,
    require_intact,
    shard_file,
    tensor_name,
)

UNFINISHED_FILE = "unfinished.json"
LOG_FILE = "shards.jsonl"

#: Names of what a run that was killed was writing, see `attn_kd._atomic.replacing_file`.
_HALF_WRITTEN = re.compile(
    r"\.(shard-\d+|shards|unfinished|manifest)-[0-9a-f]{16}\.(safetensors|jsonl|json)"
)

Progress = Callable[[Iterable[int]], Iterable[int]]
Record = Callable[[int, int], ImageRecord]  # of (index, view)


def write_cache(
    folder: Path,
    recipe: CacheRecipe,
    teacher_files: dict[str, bytes],
    record: Record,
    *,
    overwrite: bool = False,
    progress: Progress = iter,
) -> TeacherCache:
    """Make a folder hold the cache of a recipe.

    Shards that are there and intact are kept: those of an interrupted run with the same recipe, and
    those of a complete cache whose others are damaged.

    Args:
        folder: may hold nothing but a cache.
        teacher_files: what to keep of the teacher, by file name.
        record: computes the record of a view of an image; called for one view after the other.
        overwrite: replace the cache of another recipe.
        progress: wraps the iteration over the images, e.g. by a progress bar.

    Raises:
        InputError: the folder holds something else, or the cache of another recipe; or another
            process is writing into it.
        KeyboardInterrupt: Ctrl-C; the message says how to go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder) as alone:
        # Each would take what the other is writing for what a killed run has left.
        if not alone:
            raise InputError(
                f"another process is writing a teacher cache into {folder}; wait for it, or choose "
                "another folder"
            )
        return _complete(folder, recipe, teacher_files, record, overwrite, progress)


def _complete(
    folder: Path,
    recipe: CacheRecipe,
    teacher_files: dict[str, bytes],
    record: Record,
    overwrite: bool,
    progress: Progress,
) -> TeacherCache:
    shards = _Shards(folder, recipe, _begin(folder, recipe, overwrite=overwrite))
    _write_teacher(folder / TEACHER_FOLDER, teacher_files)
    index = 0
    try:
        for index in progress(range(len(recipe.images))):
            if not shards.hold(index):
                shards.add(index, [record(index, view) for view in range(recipe.views)])
    except KeyboardInterrupt:
        kept = index - index % recipe.images_per_shard
        raise KeyboardInterrupt(
            f"the same command goes on after {kept} of {len(recipe.images)} images"
        ) from None
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe.to_dict(),
        "teacher_files": {
            name: hashlib.sha256(content).hexdigest() for name, content in teacher_files.items()
        },
        "shards": [dataclasses.asdict(shard) for shard in shards.in_order()],
    }
    _write(folder / MANIFEST_FILE, _json(manifest))
    for name in (UNFINISHED_FILE, LOG_FILE):
        (folder / name).unlink(missing_ok=True)
    return TeacherCache.open(folder)


class _Shards:
    """The shards of a cache that is being written; `complete` has those there are, by file."""

    def __init__(self, folder: Path, recipe: CacheRecipe, complete: dict[str, Shard]) -> None:
        self._folder = folder
        self._recipe = recipe
        self._complete = complete
        self._tensors: dict[str, Tensor] = {}  # of the shard that is being filled
        self._grids: list[tuple[Grid, ...]] = []

    def hold(self, index: int) -> bool:
        """Whether the image is in a complete shard."""
        return self._file(index) in self._complete

    def add(self, index: int, views: list[ImageRecord]) -> None:
        """Take the next image; write and log its shard if it is the last of it."""
        for view, record in enumerate(views):
            self._tensors |= _named(index, view, record)
        self._grids.append(tuple(record.grid for record in views))
        done = index + 1
        if done == len(self._recipe.images) or done % self._recipe.images_per_shard == 0:
            self._flush(self._file(index))

    def in_order(self) -> list[Shard]:
        numbers = range(self._recipe.num_shards)
        return [self._complete[shard_file(number)] for number in numbers]

    def _flush(self, file: str) -> None:
        content = save(self._tensors, metadata={"format": "pt"})
        _write(self._folder / file, content)
        shard = Shard(file, hashlib.sha256(content).hexdigest(), tuple(self._grids))
        with open(self._folder / LOG_FILE, "ab") as log:
            log.write(_json(dataclasses.asdict(shard)))
            log.flush()
            os.fsync(log.fileno())
        self._complete[file] = shard
        self._tensors, self._grids = {}, []

    def _file(self, index: int) -> str:
        return shard_file(index // self._recipe.images_per_shard)


def _begin(folder: Path, recipe: CacheRecipe, *, overwrite: bool) -> dict[str, Shard]:
    """Make the folder ready; return the shards in it that are intact, by file."""
    before = _recipe_in(folder)
    known: dict[str, Shard] = {}
    if before is None:
        if not all(_HALF_WRITTEN.fullmatch(path.name) for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no teacher cache; choose another")
    elif difference := _difference(recipe, before):
        if not overwrite:
            raise InputError(
                f"{folder} holds another teacher cache: {difference}; expected --overwrite to "
                "replace it, or another folder"
            )
    else:
        numbers = {shard_file(number): number for number in range(recipe.num_shards)}
        known = {
            shard.file: shard
            for shard in _logged(folder)
            if shard.file in numbers
            and recipe.describes(shard, numbers[shard.file])
            and _is_intact(folder, shard)
        }
    # In this order, at every moment no shard counts for a recipe that is not its own. A folder that
    # holds a log has a recipe, too: without one nobody would know whose it is.
    if before is not None:
        log = b"".join(_json(dataclasses.asdict(shard)) for shard in known.values())
        _write(folder / LOG_FILE, log)
    _write(folder / UNFINISHED_FILE, _json({"recipe": recipe.to_dict()}))
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for path in folder.iterdir():
        is_shard = path.match("shard-*.safetensors") and path.name not in known
        if is_shard or _HALF_WRITTEN.fullmatch(path.name):
            path.unlink()
    return known


def _write_teacher(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files, by name, and no others."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()
    for name, content in files.items():
        _write(folder / name, content)


def _recipe_in(folder: Path) -> CacheRecipe | None:
    for name in (MANIFEST_FILE, UNFINISHED_FILE):
        path = folder / name
        if path.is_file():
            values = read_json(path, dict)
            try:
                return CacheRecipe.from_dict(values["recipe"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path} is no record of a teacher cache: {error!r}") from None
    return None


def _difference(now: CacheRecipe, before: CacheRecipe) -> str | None:
    """What makes two recipes different, in words; where the teacher lies makes none."""
    if now.teacher.sha256 != before.teacher.sha256:
        return f"of the teacher {before.teacher.folder}, not {now.teacher.folder}"
    for field in dataclasses.fields(CacheRecipe):
        mine, theirs = getattr(now, field.name), getattr(before, field.name)
        if field.name != "teacher" and mine != theirs:
            small = isinstance(mine, str | int) and field.name != "teacher_config"
            values = f" is {mine!r}, it was {theirs!r}" if small else " differs"
            return f"{field.name}{values}"
    return None


def _logged(folder: Path) -> list[Shard]:
    """The shards that a manifest or a log of complete shards lists."""
    if (folder / MANIFEST_FILE).is_file():
        listed = read_json(folder / MANIFEST_FILE, dict).get("shards")
        listed = listed if isinstance(listed, list) else []
    else:
        listed = []
        path = folder / LOG_FILE
        content = path.read_bytes() if path.is_file() else b""
        for line in content.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut short
                listed.append(json.loads(line))
    shards = []
    for values in listed:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            shards.append(Shard.from_dict(values))
    return shards


def _is_intact(folder: Path, shard: Shard) -> bool:
    try:
        require_intact(folder / shard.file, shard.sha256)
    except InputError:
        return False
    return True


def _named(index: int, view: int, record: ImageRecord) -> dict[str, Tensor]:
    tensors = {
        tensor_name(index, view, "output", "logits"): record.logits,
        tensor_name(index, view, "output", "boxes"): record.boxes,
    }
    for layer, factors in record.layers.items():
        for part, tensor in factors._asdict().items():
            tensors[tensor_name(index, view, layer, part)] = tensor.contiguous()
    return tensors


def _json(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and is on the disk when it does."""
    path.parent.mkdir(exist_ok=True)
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # the name, too
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
