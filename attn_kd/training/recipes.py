"""What to train each preset with: settings that differ from the defaults of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Preset -> fields of :class:`~attn_kd.training.TrainingConfig`.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # From scratch on a CPU in minutes. Gradient norms are far above 0.1 throughout, so clipping
    # sets the length of every step and the learning rate can be five times DETR's.
    "detr-tiny": {
        "pretrain_backbone_steps": 600,
        "pretrain_learning_rate": 2e-3,
        "learning_rate": 5e-4,
        "amp": "bf16-backbone",
    },
    # DETR's own (Carion et al. 2020): the backbone learns ten times slower.
    "detr-r50": {"batch_size": 8, "backbone_learning_rate": 1e-5},
}
