"""From the public functions to a backend: at once where all is plain, else with checks and casts.

Checks in Python cost several times what a small attention does. The compiled operator has its own,
which are quick but curt, so that it is simply called where it can serve, and only what it refuses
comes back to be checked here, and refused with an explanation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_kd.ops import autocast, checks, extension, philox, triton_operator
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import facts_of, select_backend
from attn_kd.ops.reference import attention_kl_reference

Results = tuple[Tensor, Tensor, Tensor]  # output, kl (empty without a teacher), lse


def run(operands: tuple, options: tuple, backend: str | None) -> Results:
    """Return the results of a call on the best backend, or on the one named.

    Without a value the divergence is computed alone, and the output is empty.

    Args:
        operands: the fields of `Operands` up to attn_mask. A plain tuple, like options, because
            making a named one takes a tenth of the time that a small attention does.
        options: the fields of `Options`.
        backend: None, or the name of one.

    Raises:
        InputError: the arguments do not fit together.
    """
    dropout_seed = None
    if (
        not torch.compiler.is_compiling()
        and extension.module is not None
        and (backend is None or backend == "cpu")
    ):
        if options[-1] != 0.0:
            dropout_seed = _draw_seed(operands[0], options[-1])
        results = extension.module.attention_kl(*operands, dropout_seed, *options)
        if results is not NotImplemented:
            return results
    named = Operands(*operands)._replace(dropout_seed=dropout_seed)
    return _run_checked(named, Options(*options), backend)


def _draw_seed(query: Tensor, dropout_p: float) -> Tensor:
    checks.check_is_tensor("query", query)
    checks.check_dropout(dropout_p)
    return philox.draw_seed(query.device)


def _run_checked(operands: Operands, options: Options, backend: str | None) -> Results:
    query, key, value, *_ = operands
    checks.check_is_tensor("query", query)
    checks.check_is_tensor("key", key)
    checks.check_options(options.divergence, options.head_reduction, options.dropout_p)
    options = options._replace(
        scale=checks.checked_scale("scale", options.scale),
        teacher_scale=checks.checked_scale("teacher_scale", options.teacher_scale),
    )
    if value is None:
        operands = operands._replace(value=key.detach()[..., :0])
    operands = autocast.cast_student(operands)
    checks.check_operands(operands, options, with_value=value is not None)
    operands = checks.detach_teacher(operands)
    chosen = select_backend(backend, facts_of(operands, options))
    if options.dropout_p > 0.0 and operands.dropout_seed is None:
        operands = operands._replace(dropout_seed=philox.draw_seed(query.device))
    if chosen != "reference":
        return _operator(chosen, operands, options)
    if not autocast.is_enabled(query.device):
        return attention_kl_reference(operands, options)
    # The logits stay float32 under autocast too: rounding them spoils the gradient.
    with torch.autocast(query.device.type, enabled=False):
        return attention_kl_reference(operands, options)


def _operator(backend: str, operands: Operands, options: Options) -> Results:
    # The device of the tensors tells the compiled operator "cpu" from "cuda".
    if backend == "triton":
        _refuse_tangents(operands)
        results = triton_operator.forward_operator(*operands, *options)
    else:
        results = torch.ops.attn_kd.attention_kl_forward(*operands, *options)
    return results[:3]


def _refuse_tangents(operands: Operands) -> None:
    """Raise where a tensor carries a tangent, which an operator defined in Python would drop."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in operands[:3]:
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("attn_kd: forward-mode differentiation is not supported")
