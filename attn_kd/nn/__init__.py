"""Attention layers that can be distilled, and the taps that record or distil them."""

from attn_kd.nn.carriers import (
    TapCarrier,
    TapReservation,
    carried_attention,
    carried_taps,
    carries_tap,
    is_self_attention_name,
)
from attn_kd.nn.multihead_attention import MultiheadAttention
from attn_kd.nn.replacement import replace_multihead_attention, restore_multihead_attention
from attn_kd.nn.taps import AttentionRecord, AttentionTaps, FuseTap, RecordTap

__all__ = [
    "AttentionRecord",
    "AttentionTaps",
    "FuseTap",
    "MultiheadAttention",
    "RecordTap",
    "TapCarrier",
    "TapReservation",
    "carried_attention",
    "carried_taps",
    "carries_tap",
    "is_self_attention_name",
    "replace_multihead_attention",
    "restore_multihead_attention",
]
