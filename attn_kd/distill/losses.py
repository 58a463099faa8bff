"""The loss of attention distillation: Rubin et al. 2021, eq. 3."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_kd.distill.distiller import DistillationResult
from attn_kd.errors import InputError


class DistillationLoss(NamedTuple):
    """The loss to minimise and its unweighted parts, all 0-dimensional."""

    total: Tensor
    detection: Tensor  # the student's own loss against the labels
    attention_kl: Tensor
    class_kl: Tensor  # without the factor T²; a constant 0 if class_weight is 0


def distillation_loss(
    result: DistillationResult,
    *,
    alpha: float,
    temperature: float = 1.0,
    class_weight: float = 0.0,
) -> DistillationLoss:
    """Return eq. 3, ``(1 - α) · L_det + α · (attention_kl + class_weight · T² · class_kl)``.

    L_det is the student's own loss: for DETR the Hungarian-matched class, L1 and GIoU terms, and
    those of the intermediate decoder layers where `auxiliary_loss` is configured.

    The paper's class term KL(σ(p̂ˢ/T) ‖ σ(p̂ᵗ/T)) leaves σ open. DETR's class scores are one softmax
    per object query over the classes and "no object", so σ is read as that softmax, and the term is
    the mean over images and object queries (`class_divergence`). Query i of the student is compared
    with query i of the teacher; that is meaningful for the paper's single query, and for several
    where the student started from the teacher's query embeddings. The paper's tables leave the
    term out (class_weight = 0, the default).

    Args:
        result: what an `AttentionDistiller` returned for a batch with labels.
        alpha: weight of the distillation terms in [0, 1]; the paper's best is 0.7.
        temperature: T > 0, softens both class distributions.
        class_weight: weight of the class term, 0 or more.

    Raises:
        InputError: an option is out of range, the student has no loss, or the class term cannot
            compare the two models' outputs.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha={alpha}, expected a number in [0, 1]")
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise InputError(f"temperature={temperature}, expected a positive number")
    if not (math.isfinite(class_weight) and class_weight >= 0.0):
        raise InputError(f"class_weight={class_weight}, expected 0 or a positive number")
    detection = getattr(result.student, "loss", None)
    if detection is None:
        raise InputError("the student returned no loss; expected a batch with labels")

    class_kl = torch.zeros_like(result.attention_kl)
    distilled = result.attention_kl
    if class_weight > 0.0:
        class_kl = class_divergence(result.student.logits, result.teacher.logits, temperature)
        distilled = distilled + class_weight * temperature**2 * class_kl
    # A plain baseline's divergence is measured, but has no part in its backward pass.
    total = detection if alpha == 0.0 else (1.0 - alpha) * detection + alpha * distilled
    return DistillationLoss(total, detection, result.attention_kl, class_kl)


def class_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(student / T) ‖ softmax(teacher / T)), mean over images and object queries.

    Args:
        student_logits, teacher_logits: [B, N, classes + 1], the last class is "no object"; the
            teacher gets no gradient. Computed in float32 at least.
        temperature: T > 0.

    Raises:
        InputError: the two differ in object queries or classes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            "the class term compares object query with object query: student logits are "
            f"{tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} "
            "[images, queries, classes + 1]; expected the same"
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    return (log_student.exp() * (log_student - log_teacher)).sum(-1).mean()
