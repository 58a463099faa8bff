"""What turns two models into a distillation: distiller, losses, pairs of layers."""

from attn_kd.distill.distiller import AttentionDistiller, DistillationResult
from attn_kd.distill.losses import DistillationLoss, distillation_loss

__all__ = ["AttentionDistiller", "DistillationLoss", "DistillationResult", "distillation_loss"]
