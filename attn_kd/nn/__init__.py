"""What attention layers share, whatever the model library: taps that record or distil a layer."""

from attn_kd.nn.taps import AttentionRecord, AttentionTaps, FuseTap, RecordTap

__all__ = ["AttentionRecord", "AttentionTaps", "FuseTap", "RecordTap"]
