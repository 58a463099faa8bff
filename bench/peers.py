"""The candidates: different ways to compute attention and its divergence from a teacher's.

All have one signature: ``candidate(query, key, value, teacher_query, teacher_key, teacher_lse)``
returns the attention output [B, H, Lq, D] and the divergence KL(student ‖ teacher) [B, H, Lq], or
None for the candidates that compute attention alone. The teacher's log-sum-exp is given, as it is
in distillation, where the teacher's own forward pass has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_kd
from bench.workloads import Shape, Workload

Candidate = Callable[..., tuple[Tensor, Tensor | None]]


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The usual code: both maps [B, H, Lq, Lk] in memory, log_softmax, KL."""
    logits = _scale(query) * query @ key.transpose(-2, -1)
    teacher_logits = _scale(teacher_query) * teacher_query @ teacher_key.transpose(-2, -1)
    log_attention = logits.log_softmax(dim=-1)
    log_teacher = teacher_logits.log_softmax(dim=-1)
    attention = log_attention.exp()
    divergence = (attention * (log_attention - log_teacher)).sum(dim=-1)
    return attention @ value, divergence


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, None]:
    """torch's attention of the student alone, no divergence: the lower bound."""
    return F.scaled_dot_product_attention(query, key, value), None


def sdpa_identity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The divergence by stock operators, exact and in O(L) memory: the strongest peer.

    Σ_j a_j s_j = scale·q·(A K) and Σ_j a_j t_j = scale_t·qᵗ·(A Kᵗ) need attention outputs only,
    with K and Kᵗ beside V. With L_s, the q to the left of A and the K to its right detached,
    autograd through A alone gives exactly ∂D/∂s_j = a_j (u_j - D).

    One call on values [V, K, Kᵗ]: flash attention wants one head_dim for all, so query and key are
    padded with zeros. That triples the work on the logits but spares two of three rounds of
    exponentials, and on a CPU it is faster than three calls.
    """
    D = query.shape[-1]
    values = torch.cat([value, key.detach(), teacher_key], dim=-1)
    padding = (0, values.shape[-1] - D)
    packed, lse = _attention_with_lse(
        F.pad(query, padding), F.pad(key, padding), values, _scale(query)
    )
    output, mean_key, mean_teacher_key = packed.split(
        [value.shape[-1], D, teacher_key.shape[-1]], -1
    )
    mean_logit = _scale(query) * _row_dot(query.detach(), mean_key)
    mean_teacher_logit = _scale(teacher_query) * _row_dot(teacher_query, mean_teacher_key)
    return output, mean_logit - mean_teacher_logit - lse.detach() + teacher_lse


def _attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's attention with its log-sum-exp [B, H, Lq]: the CPU's, or the GPU's for the dtype."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        cpu_attention = aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = cpu_attention(query, key, value, scale=scale)
    elif query.dtype == torch.float32:
        attention = aten._scaled_dot_product_efficient_attention
        output, lse, *_ = attention(query, key, value, None, True, scale=scale)
        lse = lse[..., : query.shape[-2]]  # its rows are padded to whole blocks
    else:
        output, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return output, lse


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """attn_kd's fused operator."""
    result = attn_kd.attention_kl(
        query, key, value, teacher_query, teacher_key, teacher_lse=teacher_lse, backend=backend
    )
    return result.output, result.kl


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, None]:
    """attn_kd's attention without a teacher."""
    return attn_kd.attention(query, key, value).output, None


# In the order of the tables. `compiled` is made for each measurement, by compile_eager.
CANDIDATES: dict[str, Candidate] = {
    "sdpa": sdpa,
    "attn_kd": fused,
    "attn_kd.attention": plain,
    "sdpa_identity": sdpa_identity,
    "eager": eager,
}
EAGER_MAPS = 7  # float32 maps [B, H, Lq, Lk] that `eager` holds at its peak, as measured
MEMORY_LIMIT = 4e9  # bytes; who needs more is left out


def needs_too_much_memory(shape: Shape) -> bool:
    """Whether the candidates that store maps are left out at this shape."""
    return EAGER_MAPS * shape.map_bytes > MEMORY_LIMIT


def forward(candidate: Candidate, workload: Workload) -> tuple[Tensor, Tensor | None]:
    """Output and divergence, as in evaluation: nothing is saved for a backward."""
    with torch.no_grad():
        return candidate(*workload.inputs)


def forward_backward(candidate: Candidate, workload: Workload) -> tuple[Tensor | None, ...]:
    """Output, divergence, and from their gradients those of query, key and value."""
    output, divergence = candidate(*workload.inputs)
    outputs, gradients = [output], [workload.grad_output]
    if divergence is not None:
        outputs.append(divergence)
        gradients.append(workload.grad_kl.to(divergence.dtype))
    leaves = (workload.query, workload.key, workload.value)
    return output, divergence, *torch.autograd.grad(outputs, leaves, gradients)


PASSES = {"forward": forward, "forward+backward": forward_backward}


def compile_eager(run: Callable[[Candidate, Workload], object], workload: Workload) -> Candidate:
    """`eager` through torch.compile, already compiled for one workload and one of the PASSES."""
    torch.compiler.reset()  # after eight shapes torch.compile silently runs eager code
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    run(compiled, workload)
    return compiled


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ over the last dimension, in float32 or wider: [B, H, Lq]."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) * right.to(wide)).sum(dim=-1)


def _scale(query: Tensor) -> float:
    """The default factor on the logits."""
    return query.shape[-1] ** -0.5
