"""attn_kd as an attention implementation of Hugging Face transformers.

transformers looks an implementation up by name in two registries: one of attention functions, one
of functions that build masks. A name that is only in the first gets no mask at all, silently, so
`register` enters both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_kd.errors import InputError
from attn_kd.nn.taps import TAPS_ARGUMENT, AttentionTaps
from attn_kd.ops import attention

IMPLEMENTATION = "attn_kd"

# What models pass to their attention function that changes its result.
_UNSUPPORTED_ARGUMENTS = ("position_bias", "softcap", "s_aux", "cache")


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

    A tap for `module` among the keyword arguments (see `attn_kd.nn.taps`) computes the attention
    in place of the plain operator. Attention maps are never stored, hence the None.

    Raises:
        InputError: the model asks for attention dropout or for attention maps.
        NotImplementedError: the model asks for causal attention without a mask, or for an
            argument that changes the result and that the operator does not have.
    """
    taps: AttentionTaps | None = kwargs.pop(TAPS_ARGUMENT, None)
    tap = taps.find(module) if taps is not None else None
    if taps is not None and tap is None and taps.untapped != IMPLEMENTATION:
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
    _check_supported(module, query, attention_mask, dropout, is_causal, kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if tap is None:
        output = attention(query, key, value, attn_mask=attention_mask, scale=scaling).output
    else:
        output = tap.attend(query, key, value, attn_mask=attention_mask, scale=scaling)
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
    dropout: float,
    is_causal: bool | None,
    arguments: dict[str, Any],
) -> None:
    name = type(module).__name__
    if dropout > 0.0:
        raise InputError(
            f"{name} asks for attention dropout {dropout}, which attn_kd does not have yet; build "
            "the model with attention_dropout=0.0 in its configuration"
        )
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
