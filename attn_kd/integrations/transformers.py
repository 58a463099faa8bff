"""attn_kd as an attention implementation of Hugging Face transformers.

transformers looks an implementation up by name in two registries: one of attention functions, one
of functions that build masks. A name that is only in the first gets no mask at all, silently, so
`register` enters both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_kd.errors import InputError
from attn_kd.nn.carriers import carried_attention, carries_tap
from attn_kd.nn.taps import TAPS_ARGUMENT, AttentionTaps

IMPLEMENTATION = "attn_kd"

# What models pass to their attention function that changes its result.
_UNSUPPORTED_ARGUMENTS = ("position_bias", "softcap", "s_aux", "cache")

_TAKES_OUR_MASKS = {"sdpa", IMPLEMENTATION}


def register() -> None:
    """Make ``model.set_attn_implementation("attn_kd")`` work, padding masks included.

    Once registered, `attn_implementation="attn_kd"` may also be given to `from_pretrained` and
    `from_config`. Registering again changes nothing.
    """
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    attention_mask: Tensor | None,  # bool or additive, broadcastable to [B, H, Lq, Lk]
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (attention output [B, Lq, H, Dv], None): transformers' attention interface.

    A tap for `module`, among the keyword arguments (`attn_kd.nn.taps`) or carried by the module
    (`attn_kd.nn.carriers`), computes the attention in place of the plain operator. Attention maps
    are never stored, hence the None.

    Raises:
        InputError: the model asks for attention maps.
        NotImplementedError: the model asks for causal attention without a mask, or for an
            argument that changes the result and that the operator does not have.
    """
    taps: AttentionTaps | None = kwargs.pop(TAPS_ARGUMENT, None)
    tap = taps.find(module) if taps is not None else None
    tapped = tap is not None or carries_tap(module)
    if taps is not None and not tapped and taps.untapped != IMPLEMENTATION:
        return ALL_ATTENTION_FUNCTIONS[taps.untapped](
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
    _check_supported(module, query, attention_mask, is_causal, kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attend = partial(carried_attention, module) if tap is None else tap.attend
    try:
        output = attend(
            query, key, value, attn_mask=attention_mask, scale=scaling, dropout_p=dropout
        )
    except InputError as error:
        hint = _training_only_queries(module, attention_mask)
        if hint is None:
            raise
        raise InputError(f"{error}; {hint}") from error
    return output.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Return the bool mask (True = may attend) of a layer: transformers' mask interface.

    Mere padding gives [B, 1, 1, Lk], which the operator reads in place, or None if nothing is
    padded; `attention_mask` [B, Lk] is the padding mask. Anything else is what transformers builds
    for `sdpa`, [B, 1, Lq, Lk], and always written out: there is no causal kernel.
    """
    padding_only = (
        allow_is_bidirectional_skip
        and mask_function is bidirectional_mask_function
        and (attention_mask is None or attention_mask.shape == (batch_size, kv_length))
    )
    if not padding_only:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
    if attention_mask is None:
        return None
    # A look at the values would break a traced graph in two.
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None, :]


def _check_supported(
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    arguments: dict[str, Any],
) -> None:
    name = type(module).__name__
    if arguments.get("output_attentions"):
        raise InputError(
            "output_attentions=True asks for attention maps, which attn_kd never stores; use "
            'set_attn_implementation("eager") to look at them'
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # transformers' own default
    if is_causal and mask is None and query.shape[2] > 1:
        raise NotImplementedError(
            f"{name} asks for causal attention without a mask (is_causal=True), which attn_kd does "
            "not have"
        )
    for argument in _UNSUPPORTED_ARGUMENTS:
        if arguments.get(argument) is not None:
            raise NotImplementedError(f"{name} passes {argument}, which attn_kd does not have")


def _training_only_queries(module: nn.Module, mask: Tensor | None) -> str | None:
    """Return what sets a decoder's object queries in training apart from a teacher's, if anything.

    Both are settings of a configuration: Group DETR's of RF-DETR and LW-DETR, and the denoising of
    RT-DETR and D-FINE, which has a mask where the family has none otherwise.
    """
    config = getattr(module, "config", None)
    groups = getattr(config, "group_detr", 1)
    denoising = getattr(config, "num_denoising", 0)
    if not module.training:
        return None
    if groups > 1:
        return (
            f"in training, group_detr={groups} groups of queries run as images of their own; "
            "distil this layer with group_detr=1 in the student's configuration"
        )
    if denoising > 0 and mask is not None:
        return (
            f"in training with labels, num_denoising={denoising} adds queries to the student's; "
            "distil this layer with num_denoising=0 in the student's configuration"
        )
    return None


class SwitchedImplementation:
    """An attention module of a model made to call attn_kd, until `undo`.

    Layers that share the module's configuration object are switched with it. `original` is the
    name of the implementation they had.

    Raises:
        InputError: the model does not let its implementation be set.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        register()
        self._config = configuration(module)
        owner = _owner(model, self._config)
        self.original: str = self._config._attn_implementation
        # A submodule that belongs to another model, too (a backbone of teacher and student), has a
        # configuration that the owner's does not name; transformers would switch it with the owner.
        others = [
            (part.config, part.config._attn_implementation)
            for part in owner.modules()
            if isinstance(part, PreTrainedModel) and part.config is not self._config
        ]
        # The empty key is the owner's own configuration; sub-configurations keep what they have.
        owner.set_attn_implementation({"": IMPLEMENTATION})
        for other, implementation in others:
            other._attn_implementation = {"": implementation}
        if self._config._attn_implementation != IMPLEMENTATION:
            raise InputError(
                f"{type(owner).__name__} does not let its attention implementation be set; "
                "attn_kd cannot distil it"
            )

    def undo(self) -> None:
        """Give the layers their original implementation back."""
        # Not by the model: it would ask shared submodules, too, and what one of them is may not
        # support the original.
        self._config._attn_implementation = {"": self.original}


def configuration(module: nn.Module) -> PreTrainedConfig:
    """Return the configuration object by which `module`, an attention module, is dispatched."""
    return cast(PreTrainedConfig, module.config)


def untapped_implementation(originals: Iterable[str]) -> str:
    """Return the implementation that the layers beside the tapped ones use meanwhile.

    It is their original one where that is known to take attn_kd's masks, else "sdpa".
    """
    names = set(originals)
    return names.pop() if len(names) == 1 and names <= _TAKES_OUR_MASKS else "sdpa"


def _owner(model: nn.Module, config: PreTrainedConfig) -> PreTrainedModel:
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and candidate.config is config:
            return candidate
    raise InputError(f"{type(model).__name__} has no PreTrainedModel that owns the distilled layer")
