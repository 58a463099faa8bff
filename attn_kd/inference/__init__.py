"""Running a trained detector: on pictures in memory, and on images, folders and videos."""

from attn_kd.inference.detector import Detections, Detector

__all__ = ["Detections", "Detector"]
