"""From the public functions to a backend: at once where all is plain, else with checks and casts.

Checks in Python cost several times what a small attention does. The compiled operator has its own,
which are quick but curt, so that it is simply called where it can serve, and only what it refuses
comes back to be checked here, and refused with an explanation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_kd.ops import checks, extension, philox
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import select_backend
from attn_kd.ops.reference import attention_kl_reference

Results = tuple[Tensor, Tensor, Tensor]  # output, kl (empty without a teacher), lse

_compiled = None if extension.module is None else torch.ops.attn_kd.attention_kl_forward.default


def run(
    operands: Operands, options: Options, backend: str | None, *, with_value: bool = True
) -> Results:
    """Return the results of a call on the best backend, or on the one named.

    With `with_value` false the value is ignored, and so may be anything; the output is empty.

    Raises:
        InputError: the arguments do not fit together.
    """
    if _is_plain(operands.query, backend):
        try:
            output, kl, lse, _, _ = _call_compiled(operands, options, with_value)
            if output.numel() > 0 or not with_value:
                return output, kl, lse
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            pass  # to be told what is wrong below
    return _run_checked(operands, options, backend, with_value)


def _is_plain(query: Tensor, backend: str | None) -> bool:
    """Whether the CPU kernels may be called with what the caller gave, unseen."""
    return (
        not torch.compiler.is_compiling()
        and type(query) is Tensor
        and query.is_cpu
        and (backend is None or backend == "cpu")
        and extension.module is not None
        and not torch.is_autocast_enabled("cpu")
    )


def _call_compiled(operands: Operands, options: Options, with_value: bool) -> tuple[Tensor, ...]:
    if not with_value:
        operands = operands._replace(value=_no_value(operands.key))
    if options.dropout_p > 0.0:
        operands = operands._replace(dropout_seed=philox.draw_seed(operands.query.device))
    assert _compiled is not None
    return _compiled(*operands, *options)


def _no_value(key: Tensor) -> Tensor:
    return key.detach()[..., :0]


def _run_checked(
    operands: Operands, options: Options, backend: str | None, with_value: bool
) -> Results:
    checks.check_is_tensor("query", operands.query)
    checks.check_options(options.divergence, options.head_reduction, options.dropout_p)
    options = options._replace(
        scale=checks.checked_scale("scale", options.scale),
        teacher_scale=checks.checked_scale("teacher_scale", options.teacher_scale),
    )
    if not with_value:
        checks.check_is_tensor("key", operands.key)
        operands = operands._replace(value=_no_value(operands.key))
    operands = _autocast(operands)
    checks.check_operands(operands, options, with_value=with_value)
    operands = checks.detach_teacher(operands)
    head_dims = (operands.query.shape[3], operands.value.shape[3])
    if operands.teacher_query is not None:
        head_dims += (operands.teacher_query.shape[3],)
    chosen = select_backend(backend, operands.query.device, head_dims)
    if options.dropout_p > 0.0:
        operands = operands._replace(dropout_seed=philox.draw_seed(operands.query.device))
    if chosen == "cpu":
        output, kl, lse, _, _ = torch.ops.attn_kd.attention_kl_forward(*operands, *options)
        return output, kl, lse
    if not _autocast_enabled(operands.query.device.type):
        return attention_kl_reference(operands, options)
    # The logits stay float32 under autocast too: rounding them spoils the gradient.
    with torch.autocast(operands.query.device.type, enabled=False):
        return attention_kl_reference(operands, options)


def _autocast(operands: Operands) -> Operands:
    """Cast the student's tensors as autocast casts those of scaled_dot_product_attention."""
    device_type = operands.query.device.type
    if not _autocast_enabled(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    query, key, value = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
        for t in operands[:3]
    )
    return operands._replace(query=query, key=key, value=value)


def _autocast_enabled(device_type: str) -> bool:
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)
