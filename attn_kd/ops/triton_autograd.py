"""Differentiation and autocast of the Triton operators: csrc/autograd.cpp and csrc/autocast.cpp
in Python, for every transform of torch.func and the compiler alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from attn_kd.ops import autocast
from attn_kd.ops.arguments import Operands
from attn_kd.ops.autograd import FusedAttentionKL, with_constants
from attn_kd.ops.triton_layouts import InputRefusedError

_OPERANDS = len(Operands._fields)
_DIFFERENTIABLE = 3  # query, key, value

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(*arguments: Any) -> Results:
    """The Autograd kernel of the forward operator."""
    student, constants = arguments[:_DIFFERENTIABLE], arguments[_DIFFERENTIABLE:_OPERANDS]
    _check_no_tangent(student)
    if not torch.is_grad_enabled():
        return _below_autograd(_forward_operator(), arguments)
    for name, tensor in zip(Operands._fields[_DIFFERENTIABLE:], constants, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise InputRefusedError(f"{name} requires grad, but no gradient is computed for it")
    if any(tensor.requires_grad for tensor in student):
        return _apply(_Attention, arguments)
    return _below_autograd(_forward_operator(), arguments)


def backward(*arguments: Any, output_mask: tuple[bool, ...] = (True,) * 3) -> tuple[Tensor, ...]:
    """The Autograd kernel of the backward operator, whose own derivative is refused."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _apply(_Gradients, (output_mask, *arguments))
    return _below_autograd(_backward_operator(), arguments, output_mask=output_mask)


def casting(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Autocast kernel of the forward operator for a type of device."""
    key = getattr(torch._C.DispatchKey, autocast_key(device_type))

    def cast(*arguments: Any) -> tuple[Tensor, ...]:
        operands = autocast.cast_student(Operands(*arguments[:_OPERANDS]))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _forward_operator()(*operands, *arguments[_OPERANDS:])

    return cast


def autocast_key(device_type: str) -> str:
    """The dispatch key of autocast for a type of device."""
    return "Autocast" + torch._C._dispatch_key_for_device(device_type)


class _Recorded(_SingleLevelFunction):
    """A Function of one level of torch.func: the level whose Autograd kernel applies it.

    A `torch.autograd.Function` would begin at the innermost level again, and is refused below the
    dispatcher.
    """

    apply: ClassVar[Callable[..., Any]]  # torch's own, of which its types say nothing
    # Compiled autograd asks for it, and finds it in Function alone.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _Attention(_Recorded):
    """What the forward operator records."""

    setup_context = staticmethod(FusedAttentionKL.setup_context)

    @staticmethod
    def forward(*arguments: Any) -> Results:
        with _outer_levels_recording():
            return _below_autograd(_forward_operator(), arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:_DIFFERENTIABLE]
        of_student = _backward_operator()(
            *grads[:3], *ctx.saved_tensors, *ctx.options, output_mask=wanted
        )
        return with_constants(of_student, wanted)


class _Gradients(_Recorded):
    """What the backward operator records: without it the derivative would silently be zero."""

    @staticmethod
    def forward(output_mask: tuple[bool, ...], *arguments: Any) -> tuple[Tensor, ...]:
        with _outer_levels_recording():
            return _below_autograd(_backward_operator(), arguments, output_mask=output_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the derivative of attn_kd::triton_attention_kl_backward is not implemented"
        )


def _forward_operator() -> Any:
    return torch.ops.attn_kd.triton_attention_kl_forward.default


def _backward_operator() -> Any:
    return torch.ops.attn_kd.triton_attention_kl_backward.default


def _below_autograd(operator: Any, arguments: tuple, **options: Any) -> Any:
    """Call the operator's kernel of the device, or of the next level of torch.func."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **options)


def _apply(function: type[_Recorded], arguments: tuple) -> Any:
    """Record the function at the level of torch.func whose Autograd kernel this is."""
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


@contextmanager
def _outer_levels_recording() -> Iterator[None]:
    """Within the forward pass of a Function, turn on what it turned off.

    Below this level nothing is recorded anyway, but at the outer ones of torch.func.
    """
    with torch.enable_grad(), _set_fwd_grad_enabled(True):
        yield


def _check_no_tangent(student: tuple[Tensor, ...]) -> None:
    """Raise where a tensor carries a tangent, which an operator defined in Python would drop."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in student:
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("attn_kd: forward-mode differentiation is not supported")
