"""Detection data: COCO-format folders and simulated ultrasound."""

from attn_kd.data.augmentation import Augmentation
from attn_kd.data.coco import (
    CocoSplit,
    ImageAnnotations,
    ImageEntry,
    annotation_file,
    load_split,
)
from attn_kd.data.collator import DetectionCollator
from attn_kd.data.detection import CocoDetection
from attn_kd.data.images import read_image, to_rgb

__all__ = [
    "Augmentation",
    "CocoDetection",
    "CocoSplit",
    "DetectionCollator",
    "ImageAnnotations",
    "ImageEntry",
    "annotation_file",
    "load_split",
    "read_image",
    "to_rgb",
]
