"""Detection transformers: builders of DETR-n/n, their image processors, and model folders.

Everything here is transformers' own ``DetrForObjectDetection``; what this package adds is which
one (the presets), how it starts (the initialisation of the original DETR), and what a distillation
does with its backbone. A model folder is what ``save_pretrained`` writes.
"""

from attn_kd.models.backbone import freeze_backbone, load_backbone_weights
from attn_kd.models.checkpoint import load_detector, save_detector
from attn_kd.models.complexity import count_macs, count_parameters
from attn_kd.models.detr import build_detr, build_image_processor
from attn_kd.models.presets import PRESETS, Preset, get_preset

__all__ = [
    "PRESETS",
    "Preset",
    "build_detr",
    "build_image_processor",
    "count_macs",
    "count_parameters",
    "freeze_backbone",
    "get_preset",
    "load_backbone_weights",
    "load_detector",
    "save_detector",
]
