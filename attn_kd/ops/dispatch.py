"""From the public functions to a backend: at once where all is plain, else with checks and casts.

Checks in Python cost several times what a small attention does. The operators have their own, which
are quick but curt, so that they are simply called where they can serve, and only what they refuse
comes back to be checked here, and refused with an explanation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_kd.ops import autocast, checks, extension, philox
from attn_kd.ops.arguments import Operands, Options
from attn_kd.ops.backends import facts_of, machine_refusal, select_backend
from attn_kd.ops.reference import attention_kl_reference
from attn_kd.ops.triton_layouts import RefusedError
from attn_kd.ops.triton_operator import forward_operator as triton_operator

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
    if _is_plain_for_triton(operands, options, backend):
        if options[-1] != 0.0 and dropout_seed is None:
            dropout_seed = _draw_seed(operands[0], options[-1])
        try:
            return _by_triton(operands, dropout_seed, options)
        except RefusedError:
            pass  # what does not fit is explained below
    named = Operands(*operands)._replace(dropout_seed=dropout_seed)
    return _run_checked(named, Options(*options), backend)


_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter, type(None)))
_PLAIN_NUMBERS = frozenset((float, type(None)))


def _is_plain_for_triton(operands: tuple, options: tuple, backend: str | None) -> bool:
    """Whether to call the Triton operator as the compiled one is called: to see if it can serve."""
    if not (backend is None or backend == "triton") or torch.compiler.is_compiling():
        return False
    query, key, value, *_ = operands
    if query is None or key is None or not _PLAIN_TENSORS.issuperset(map(type, operands)):
        return False
    scale, teacher_scale, divergence, head_reduction, dropout_p = options
    if not (type(scale) in _PLAIN_NUMBERS and type(teacher_scale) in _PLAIN_NUMBERS):
        return False
    if not (type(divergence) is type(head_reduction) is str and type(dropout_p) in (float, int)):
        return False
    if value is not None and value.shape[-1:] == (0,):
        return False  # a mistake: the divergence alone is had without one
    if backend is None and not query.is_cuda:
        return False
    device = query.device
    return machine_refusal("triton", device.type, device.index) is None


def _by_triton(operands: tuple, dropout_seed: Tensor | None, options: tuple) -> Results:
    query, key, value, *rest = operands
    if value is None:
        value = key.new_empty((*key.shape[:3], 0))
    return triton_operator(query, key, value, *rest, dropout_seed, *options)[:3]


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
        # The device of the tensors tells the compiled operator "cpu" from "cuda".
        compiled = chosen != "triton"
        operator = torch.ops.attn_kd.attention_kl_forward if compiled else triton_operator
        return operator(*operands, *options)[:3]
    if not autocast.is_enabled(query.device):
        return attention_kl_reference(operands, options)
    # The logits stay float32 under autocast too: rounding them spoils the gradient.
    with torch.autocast(query.device.type, enabled=False):
        return attention_kl_reference(operands, options)
