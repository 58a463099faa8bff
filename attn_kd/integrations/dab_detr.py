"""DAB-DETR of transformers, whose attention is written out instead of looked up by name.

Its modules are made attn_kd's by their class, and its layers are distilled like those of any other
model then, at the paths they have::

    teacher = DabDetrForObjectDetection.from_pretrained("IDEA-Research/dab-detr-resnet-50")
    replace_attention(teacher)
    replace_attention(student)
    layers = {"model.encoder.layers.2.self_attn": "model.encoder.layers.5.self_attn"}
    distiller = attn_kd.AttentionDistiller(teacher, student, layers=layers)

A decoder layer's are `self_attn.self_attn` and `cross_attn.cross_attn`.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.dab_detr import modeling_dab_detr

from attn_kd.integrations.transformers import IMPLEMENTATION, register
from attn_kd.nn.carriers import TapCarrier, carried_attention
from attn_kd.nn.maps import attention_map


class DabDetrEncoderAttention(TapCarrier, modeling_dab_detr.DetrAttention):
    """An encoder layer's self-attention, with positions added to queries and keys."""

    num_heads: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,  # [B, L, hidden_size]
        attention_mask: Tensor | None = None,  # broadcastable to [B, H, L, L]
        object_queries: Tensor | None = None,  # [B, L, hidden_size], position embeddings
        key_value_states: Tensor | None = None,  # not used, as in transformers
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output [B, L, hidden_size], map [B, H, L, L] if asked for)."""
        placed = hidden_states if object_queries is None else hidden_states + object_queries
        output, weights = _attend(
            self,
            self.q_proj(placed),
            self.k_proj(placed),
            self.v_proj(hidden_states),
            attention_mask,
            self.num_heads,
            output_attentions,
        )
        return self.out_proj(output), weights


class DabDetrDecoderAttention(TapCarrier, modeling_dab_detr.DabDetrAttention):
    """A decoder layer's self- or cross-attention; the projections are its caller's."""

    attention_heads: int
    output_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,  # [B, Lq, embed_dim]
        attention_mask: Tensor | None,  # broadcastable to [B, H, Lq, Lk]
        key_states: Tensor,  # [B, Lk, embed_dim]
        value_states: Tensor,  # [B, Lk, output_dim]
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output [B, Lq, output_dim], map [B, H, Lq, Lk] if asked for)."""
        output, weights = _attend(
            self,
            hidden_states,
            key_states,
            value_states,
            attention_mask,
            self.attention_heads,
            bool(output_attentions),
        )
        return self.output_proj(output), weights


class DabDetrDecoderSelfAttentionBlock(modeling_dab_detr.DabDetrDecoderLayerSelfAttention):
    """A decoder layer's self-attention and what surrounds it.

    The original asks for the map in every pass, wanted or not; this one only when it is wanted.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [B, N, hidden_size]
        query_position_embeddings: Tensor | None = None,  # [B, N, hidden_size]
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output [B, N, hidden_size], map [B, H, N, N] if asked for)."""
        position = query_position_embeddings
        query = self.self_attn_query_content_proj(hidden_states)
        key = self.self_attn_key_content_proj(hidden_states)
        mixed, weights = self.self_attn(
            hidden_states=query + self.self_attn_query_pos_proj(position),
            attention_mask=attention_mask,
            key_states=key + self.self_attn_key_pos_proj(position),
            value_states=self.self_attn_value_proj(hidden_states),
            output_attentions=output_attentions,
        )
        mixed = nn.functional.dropout(mixed, p=self.dropout, training=self.training)
        return self.self_attn_layer_norm(hidden_states + mixed), weights


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_dab_detr.DetrAttention: DabDetrEncoderAttention,
    modeling_dab_detr.DabDetrAttention: DabDetrDecoderAttention,
    modeling_dab_detr.DabDetrDecoderLayerSelfAttention: DabDetrDecoderSelfAttentionBlock,
}
_ORIGINALS = {ours: original for original, ours in _REPLACEMENTS.items()}


def replace_attention(model: nn.Module) -> list[str]:
    """Make the attention of every DAB-DETR in `model` compute by attn_kd; return the paths.

    In place, and nothing is copied: the modules stay the same objects at the same paths and change
    their class; `restore_attention` undoes it. The padding mask is [B, 1, 1, HW] from then on, not
    written out for every query. Maps (`output_attentions=True`) are computed openly, besides.
    """
    register()
    return _change_classes(model, _REPLACEMENTS, IMPLEMENTATION)


def restore_attention(model: nn.Module) -> list[str]:
    """Make the attention of every DAB-DETR in `model` transformers' own again; return the paths."""
    return _change_classes(model, _ORIGINALS, "eager")  # DAB-DETR has no other


def _change_classes(
    model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]], implementation: str
) -> list[str]:
    changed = []
    for path, module in model.named_modules():
        if type(module) not in classes:
            continue
        module.__class__ = classes[type(module)]
        if hasattr(module, "config"):
            # What builds the masks goes by this name; the empty key leaves the backbone alone.
            module.config._attn_implementation = {"": implementation}
            changed.append(path)
    return changed


def _attend(
    module: modeling_dab_detr.DetrAttention | modeling_dab_detr.DabDetrAttention,
    query: Tensor,  # [B, Lq, H * D]
    key: Tensor,  # [B, Lk, H * D]
    value: Tensor,  # [B, Lk, H * Dv]
    mask: Tensor | None,
    heads: int,
    wants_map: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (output [B, Lq, H * Dv], map [B, H, Lq, Lk] or None)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    output = carried_attention(
        module,
        query,
        key,
        value,
        attn_mask=mask,
        scale=module.scaling,
        dropout_p=module.attention_dropout if module.training else 0.0,
    )
    weights = attention_map(query, key, mask, module.scaling) if wants_map else None
    return output.transpose(1, 2).flatten(2), weights
