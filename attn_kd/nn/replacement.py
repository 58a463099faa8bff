"""Making torch.nn.MultiheadAttention of an existing model compute by attn_kd, and undoing it."""

from __future__ import annotations

import warnings

from torch import nn

from attn_kd.nn.carriers import TapCarrier, forget_released
from attn_kd.nn.multihead_attention import MultiheadAttention, keep_from_fast_path

_USED_NESTED_TENSOR = "_attn_kd_used_nested_tensor"


def replace_multihead_attention(model: nn.Module, *, returns_weights: bool = True) -> list[str]:
    """Make every torch.nn.MultiheadAttention in `model` an `attn_kd.nn.MultiheadAttention`.

    In place, and nothing is copied: the modules stay the same objects at the same paths and change
    their class, so their parameters, hooks, mode, and whoever refers to them (an optimizer, another
    module) stay what they are. `restore_multihead_attention` undoes it. Subclasses of torch's
    module are left alone, with a warning: what they compute is their own. Models of both sides are
    prepared for distillation by::

        for model in (teacher, student):  # facebookresearch's DETR, say
            attn_kd.nn.replace_multihead_attention(model, returns_weights=False)
        with attn_kd.AttentionDistiller(teacher, student) as distiller:
            result = distiller(samples=images)

    Args:
        model: any model; it may itself be a torch.nn.MultiheadAttention.
        returns_weights: False for models that drop the maps they get, such as
            facebookresearch's DETR: see `MultiheadAttention`.

    Returns:
        The paths of the replaced modules, as in `named_modules`; a module that occurs several times
        has one path. Empty if there was none.
    """
    replaced: list[str] = []
    kept: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and vars(module).get("use_nested_tensor"):
            # It would hand its layers nested tensors in evaluation mode.
            module.use_nested_tensor = False
            setattr(module, _USED_NESTED_TENSOR, True)
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            keep_from_fast_path(module)
            if not returns_weights:
                vars(module)["returns_weights"] = False
            replaced.append(path)
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, TapCarrier):
            kept.append(f"{path!r} ({type(module).__name__})")
    if kept:
        warnings.warn(
            f"not replaced, for they are subclasses of torch.nn.MultiheadAttention: "
            f"{', '.join(kept)}; replace before parametrizing or wrapping a model",
            stacklevel=2,
        )
    return replaced


def restore_multihead_attention(model: nn.Module) -> list[str]:
    """Make every `attn_kd.nn.MultiheadAttention` in `model` a torch.nn.MultiheadAttention again.

    In place, likewise; it works on modules that were built as attn_kd's too.

    Returns:
        The paths of the restored modules.
    """
    restored = []
    for path, module in model.named_modules():
        forget_released(module)
        if _USED_NESTED_TENSOR in vars(module):
            module.use_nested_tensor = vars(module).pop(_USED_NESTED_TENSOR)
        if type(module) is MultiheadAttention:
            for name in ("returns_weights", "self_attention"):
                vars(module).pop(name, None)
            module._qkv_same_embed_dim = module.in_proj_weight is not None
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            restored.append(path)
    return restored
