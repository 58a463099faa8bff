"""The public operators and what stands beneath them. Knows nothing of detectors."""

from attn_kd.ops.autograd import FusedAttentionKL
from attn_kd.ops.backends import BackendStatus, available_backends
from attn_kd.ops.functional import (
    AttentionKLDivOutput,
    AttentionKLOutput,
    AttentionOutput,
    attention,
    attention_kl,
    attention_kl_div,
)

__all__ = [
    "AttentionKLDivOutput",
    "AttentionKLOutput",
    "AttentionOutput",
    "BackendStatus",
    "FusedAttentionKL",
    "attention",
    "attention_kl",
    "attention_kl_div",
    "available_backends",
]
