"""What turns two models into a distillation: distiller, losses, pairs of layers."""

from attn_kd.distill.distiller import AttentionDistiller, DistillationResult
from attn_kd.distill.layers import depth_map
from attn_kd.distill.losses import DistillationLoss, distillation_loss
from attn_kd.distill.recorder import TeacherPass, TeacherRecorder

__all__ = [
    "AttentionDistiller",
    "DistillationLoss",
    "DistillationResult",
    "TeacherPass",
    "TeacherRecorder",
    "depth_map",
    "distillation_loss",
]
