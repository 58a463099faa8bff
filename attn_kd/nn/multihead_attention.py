"""A drop-in for torch.nn.MultiheadAttention that computes by attn_kd and can be distilled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kd.errors import InputError
from attn_kd.nn.carriers import TapCarrier, carried_attention, carries_tap
from attn_kd.nn.maps import attention_map
from attn_kd.nn.masks import merge_masks, with_visible_keys
from attn_kd.ops import autocast
from attn_kd.ops.checks import check_is_tensor


class MultiheadAttention(TapCarrier, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without attention maps, and with the taps of distillation.

    Constructor, parameters, initialisation, `state_dict`, call and results are torch's; either
    loads the other's weights. What differs:

    - Nothing of size Lq x Lk is stored, forward or backward, with `need_weights=False`. With
      `need_weights=True`, torch's default, the map is computed openly, by the slow path, at O(Lq ·
      Lk) memory. For models that ask for maps only to drop them (facebookresearch's DETR calls
      ``self.self_attn(q, k, value=src, ...)[0]``), set `returns_weights = False` on the module: it
      then returns (output, None) whatever it is asked for.
    - A query that sees no key gives output 0 (before the output projection) and a map of zeros,
      where torch's map, and often its output, are NaN.
    - A value of -1e6 or less in an additive mask hides the key, as -inf does. torch adds it up: a
      row of nothing but such values is 0 here, and there an average over all keys.
    - `is_causal=True` asks for an `attn_mask`, as in torch, and is otherwise ignored: the mask
      itself is applied.
    - An additive mask that requires grad gets its gradient by the slow path too, and cannot be
      distilled under: the operator has no gradient for it.
    - Wrong shapes and dtypes raise `InputError`, a ValueError. Nested tensors are not supported;
      the fast path that `torch.nn.TransformerEncoderLayer` takes in evaluation mode, which calls
      no attention module at all, is not taken. (torch asks `_qkv_same_embed_dim` whether it may.)

    While a tap is carried (see `attn_kd.nn.carriers`), the output is the tap's in any case, and the
    map that `need_weights=True` returns is computed beside it, without dropout.
    """

    returns_weights: bool = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        keep_from_fast_path(self)

    def forward(
        self,
        query: Tensor,  # [Lq, B, embed_dim]; [B, Lq, embed_dim] if batch_first; or [Lq, embed_dim]
        key: Tensor,  # likewise with Lk and kdim
        value: Tensor,  # likewise with Lk and vdim
        key_padding_mask: Tensor | None = None,  # [B, Lk] or [Lk]; True or -inf = ignore
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [Lq, Lk] or [B * H, Lq, Lk]; True or -inf = ignore
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output like query, map or None), as `torch.nn.MultiheadAttention` does.

        The map is [B, Lq, Lk], averaged over heads, or [B, H, Lq, Lk] if not
        `average_attn_weights`; without B for unbatched inputs. In training mode it has the dropout
        applied, as in torch.

        Raises:
            InputError: shapes or dtypes do not fit together; the message names the value.
        """
        if is_causal and attn_mask is None:
            raise InputError(
                "is_causal=True without attn_mask; expected the causal mask with it, as "
                "torch.nn.MultiheadAttention does"
            )
        self._check_tokens(query, key, value)
        batched, batch_dim = query.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            query, key, value = (x.unsqueeze(batch_dim) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        self._check_masks(query, key, key_padding_mask, attn_mask)

        mask = merge_masks(key_padding_mask, attn_mask, query.shape[batch_dim])
        heads, mask = self._with_extra_keys(*self._project(query, key, value), mask)
        output, weights = self._attention(*heads, mask, need_weights and self.returns_weights)
        output = self.out_proj(self._join_heads(output))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            output = output.squeeze(batch_dim)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of every head, [B, H, L, D]."""
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights: tuple[Tensor, ...] = (
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
            )
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            tokens = (query, key, value)
            projected = tuple(map(F.linear, tokens, weights, biases))
        heads = [self._split_heads(x) for x in projected]
        return heads[0], heads[1], heads[2]

    def _split_heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return x.flatten(2)

    def _with_extra_keys(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Append the keys of `add_bias_kv` and `add_zero_attn`, which nothing masks."""
        length = key.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            biases = (bias.view(shape).to(key.dtype) for bias in (self.bias_k, self.bias_v))
            key, value = (
                torch.cat([x, bias.expand(x.shape[0], -1, -1, -1)], dim=2)
                for x, bias in zip((key, value), biases, strict=True)
            )
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        extra = key.shape[2] - length
        if extra and carries_tap(self):
            raise InputError(
                "a MultiheadAttention with add_bias_kv or add_zero_attn attends to keys that are "
                "no tokens; expected one without them to distil"
            )
        return (query, key, value), with_visible_keys(mask, extra)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, wants_map: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output [B, H, Lq, D], map [B, H, Lq, Lk] or None)."""
        dropout_p = self.dropout if self.training else 0.0
        learned_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
        if (wants_map or learned_mask) and not carries_tap(self):
            weights = F.dropout(attention_map(query, key, mask), dropout_p)
            return weights @ value, weights if wants_map else None
        if 0 in (query.numel(), key.numel()) and not carries_tap(self):
            # No image, no query or no key, which torch takes and the operator does not. A sum over
            # no keys is 0, as where all keys are hidden.
            output = query @ key.mT @ value
        else:
            output = carried_attention(self, query, key, value, attn_mask=mask, dropout_p=dropout_p)
        return output, attention_map(query, key, mask) if wants_map else None

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        tensors = {"query": query, "key": key, "value": value}
        widths = (self.embed_dim, self.kdim, self.vdim)
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        for (name, tensor), width in zip(tensors.items(), widths, strict=True):
            check_is_tensor(name, tensor)
            if tensor.dtype != weight.dtype and not autocast.is_enabled(tensor.device):
                raise InputError(f"{name} is {tensor.dtype}, expected the weights' {weight.dtype}")
            if tensor.is_nested:
                raise InputError(
                    f"{name} is a nested tensor, expected a padded one with a key_padding_mask; "
                    "torch.nn.TransformerEncoder(..., enable_nested_tensor=False) passes those on"
                )
            if tensor.dim() != query.dim() or tensor.dim() not in (2, 3):
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)}, expected 3 dimensions, or 2 for "
                    "each of query, key and value"
                )
            if tensor.shape[-1] != width:
                raise InputError(f"{name} has {tensor.shape[-1]} features, expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise InputError(
                f"key has shape {tuple(key.shape)} but value {tuple(value.shape)}; expected as "
                "many tokens"
            )
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch_dim] != query.shape[batch_dim]:
            raise InputError(
                f"key has batch {key.shape[batch_dim]}, expected {query.shape[batch_dim]} as in "
                f"query (batch_first={self.batch_first})"
            )

    def _check_masks(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        batch, queries, keys = (
            query.shape[batch_dim],
            query.shape[length_dim],
            key.shape[length_dim],
        )
        _check_mask("key_padding_mask", key_padding_mask, (batch, keys))
        each_head = (batch * self.num_heads, queries, keys)
        _check_mask("attn_mask", attn_mask, (queries, keys), each_head)


def keep_from_fast_path(module: nn.MultiheadAttention) -> None:
    """Make torch's encoder layers call `module` in evaluation mode too.

    Otherwise `torch.nn.TransformerEncoderLayer` reads its weights and never calls it. The forward
    pass of `MultiheadAttention` looks at the parameters that are there instead.
    """
    module._qkv_same_embed_dim = False


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    check_is_tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"{name} is {mask.dtype}, expected torch.bool or a floating dtype")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise InputError(f"{name} has shape {tuple(mask.shape)}, expected {expected}")
