"""What a teacher cache keeps of the teacher itself, and the teacher that is made of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import DetrConfig, DetrForObjectDetection
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from attn_kd.errors import InputError
from attn_kd.models.backbone import thaw_batch_norm
from attn_kd.models.checkpoint import CONFIG_FILE, PROCESSOR_FILE
from attn_kd.training.records import RECORD_FILE

BACKBONE_FILE = "backbone.safetensors"

_PROBED_SIDE = 512  # pixels; a multiple of every stride


def teacher_files(folder: str | os.PathLike, teacher: DetrForObjectDetection) -> dict[str, bytes]:
    """Content of the files of a cache's teacher folder, by name: all but the transformer's weights.

    Args:
        folder: the teacher's model folder.
        teacher: what is in it.
    """
    backbone = teacher.model.backbone.state_dict()
    record = Path(folder) / RECORD_FILE  # where attn_kd has trained it
    weights = {name: tensor.cpu().contiguous() for name, tensor in backbone.items()}
    return {
        CONFIG_FILE: (Path(folder) / CONFIG_FILE).read_bytes(),
        PROCESSOR_FILE: (Path(folder) / PROCESSOR_FILE).read_bytes(),
        BACKBONE_FILE: save(weights, metadata={"format": "pt"}),
        **({RECORD_FILE: record.read_bytes()} if record.is_file() else {}),
    }


def load_skeleton(folder: Path) -> tuple[DetrForObjectDetection, BaseImageProcessor]:
    """The teacher of a cache: it has its layers and the weights of its backbone, but cannot run.

    The transformer is on the meta device, where tensors have a shape and no content.

    Args:
        folder: that was filled with `teacher_files`.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        config = DetrConfig.from_pretrained(folder, local_files_only=True)
        processor = DetrImageProcessorPil.from_pretrained(folder, local_files_only=True)
        skeleton = _without_weights(config)
        weights = load_file(folder / BACKBONE_FILE)
        skeleton.model.backbone.load_state_dict(weights, assign=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}, the teacher of the cache, is damaged: {error}") from error
    return skeleton.requires_grad_(False).eval(), processor


def token_stride(config: DetrConfig) -> int:
    """Height and width in pixels of the cells that a DETR's transformer attends to.

    Raises:
        InputError: its backbone divides images into a grid that is no plain division.
    """
    with torch.device("meta"), torch.no_grad():
        backbone = _without_weights(config).model.backbone
        image = torch.empty(1, 3, _PROBED_SIDE, _PROBED_SIDE)
        features, _ = backbone(image, torch.ones(1, _PROBED_SIDE, _PROBED_SIDE))[-1]
    height, width = features.shape[-2:]
    if height != width or _PROBED_SIDE % height:
        raise InputError(
            f"the backbone turns {_PROBED_SIDE} x {_PROBED_SIDE} pixels into {height} x {width} "
            "cells; expected cells of a whole number of pixels"
        )
    return _PROBED_SIDE // height


def _without_weights(config: DetrConfig) -> DetrForObjectDetection:
    with torch.device("meta"):
        model = DetrForObjectDetection(config)
    if getattr(config, "trainable_batch_norm", False):
        thaw_batch_norm(model)
    return model.eval()
