"""What is done to the backbone of a DETR: batch norm thawed, weights shared, all of it frozen.

transformers replaces every ``BatchNorm2d`` of a DETR backbone by a ``DetrFrozenBatchNorm2d``, whose
statistics and affine parameters are buffers. That suits a pretrained backbone. For one trained from
scratch :func:`thaw_batch_norm` puts real batch norm back. The names of the tensors stay the same,
so a saved model also loads in plain transformers, with frozen norms and the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DetrForObjectDetection
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from attn_kd.errors import InputError

_SHARED_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by its running statistics in training too, with parameters that stay parameters.

    ``train()`` leaves it in evaluation mode, so a trainer that calls ``model.train()`` before every
    step neither updates the statistics nor normalises by those of the batch.
    """

    def train(self, mode: bool = True) -> FixedStatisticsBatchNorm2d:
        return super().train(False)


def thaw_batch_norm(model: DetrForObjectDetection) -> None:
    """Replace the backbone's frozen batch norms, in place, by ones that learn."""
    _replace_batch_norms(model.model.backbone, DetrFrozenBatchNorm2d, _trainable_batch_norm)


def freeze_backbone(model: DetrForObjectDetection) -> None:
    """Stop the backbone, in place, from learning: no gradients, and batch norm by fixed statistics.

    This is the setting of Rubin et al. 2021, in which only the transformer learns. The projection
    from the backbone's channels to ``d_model`` belongs to the transformer and goes on learning.
    """
    backbone = model.model.backbone
    _replace_batch_norms(backbone, nn.BatchNorm2d, _fixed_batch_norm)
    backbone.requires_grad_(False)


def load_backbone_weights(student: DetrForObjectDetection, teacher: DetrForObjectDetection) -> None:
    """Copy the teacher's backbone, batch norm statistics included, into the student's.

    Raises:
        InputError: the backbones differ in shape; the message names the first tensor that does.
    """
    source = _tensors(teacher.model.backbone)
    target = _tensors(student.model.backbone)
    for name in sorted(source.keys() | target.keys()):
        shapes = [tuple(side[name].shape) if name in side else None for side in (target, source)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the student's backbone does not match the teacher's: {name} has shape "
                f"{shapes[0]} in the student and {shapes[1]} in the teacher"
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _tensors(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, but for the step counters that only some norms have."""
    tensors = backbone.state_dict(keep_vars=True)
    return {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}


def _replace_batch_norms(
    parent: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]
) -> None:
    for name, child in parent.named_children():
        if type(child) is kind:
            setattr(parent, name, make(child).train(child.training))
        else:
            _replace_batch_norms(child, kind, make)


def _trainable_batch_norm(frozen: DetrFrozenBatchNorm2d) -> nn.Module:
    norm = nn.BatchNorm2d(frozen.weight.numel()).to(frozen.weight)
    with torch.no_grad():
        for name in _SHARED_TENSORS:
            getattr(norm, name).copy_(getattr(frozen, name))
    return norm


def _fixed_batch_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """The same norm with the very same parameters, so that optimisers and counts keep theirs."""
    fixed = FixedStatisticsBatchNorm2d(norm.num_features, eps=norm.eps, device="meta")
    fixed._parameters = norm._parameters
    fixed._buffers = norm._buffers
    return fixed
