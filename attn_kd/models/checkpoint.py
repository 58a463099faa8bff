"""Model folders: ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import DetrForObjectDetection
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.utils import logging

from attn_kd.errors import InputError
from attn_kd.models.backbone import thaw_batch_norm

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"


def save_detector(
    model: DetrForObjectDetection,
    processor: DetrImageProcessorPil,
    folder: str | os.PathLike,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; each file appears whole or not at all.

    An existing folder keeps its other files, such as checkpoints and the history of the training.
    The configuration comes last, so that a folder that has one has the rest.

    Args:
        extra: objects to write beside as ``NAME.json``, by NAME.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as path, quiet_transformers():
        staging = Path(path)
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        for name, value in (extra or {}).items():
            (staging / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
        shutil.copymode(staging / CONFIG_FILE, staging / WEIGHTS_FILE)  # safetensors' are private
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE):
            os.replace(file, folder / file.name)


def load_detector(
    folder: str | os.PathLike,
) -> tuple[DetrForObjectDetection, DetrImageProcessorPil]:
    """Read a model folder; the model is in evaluation mode and all of it can learn.

    Raises:
        InputError: the folder or one of its files is missing, cannot be read, or does not hold a
            complete DETR.
    """
    folder = Path(folder)
    _require_detr(folder)
    with quiet_transformers():
        try:
            model, report = DetrForObjectDetection.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        # ImportError: the configuration asks for a backbone of a package that is not installed.
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            ImportError,
            SafetensorError,
        ) as error:
            raise InputError(f"{folder}: cannot load the model: {error}") from error
        try:
            processor = DetrImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder / PROCESSOR_FILE} is broken: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{folder / WEIGHTS_FILE} lacks {len(missing)} tensors of the model, first {missing[0]}"
        )
    if getattr(model.config, "trainable_batch_norm", False):
        thaw_batch_norm(model)
    model.requires_grad_(True)
    return model.eval(), processor


def _require_detr(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a model folder: there is no such folder")
    for name in (CONFIG_FILE, WEIGHTS_FILE, PROCESSOR_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model folder: it has no {name}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "detr":
        raise InputError(f"{folder / CONFIG_FILE} has model_type {kind!r}; expected 'detr'")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong becomes an error here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
