"""Attention modules that carry their tap themselves, in models that hand no arguments down.

The tap is an attribute of the module during one forward pass, and of no module before or after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from attn_kd.nn.taps import Tap
from attn_kd.ops import attention

_TAP = "_attn_kd_tap"
_RESERVATIONS = "_attn_kd_reservations"
_NAMES_OF_CROSS_ATTENTION = ("cross", "encoder", "memory", "multihead_attn")


class TapCarrier(nn.Module):
    """Base of attention modules that always compute their attention by `carried_attention`.

    `self_attention` says whether its queries come from the same tokens as its keys, which decides
    which rows a distillation averages over; None, the default, goes by the module's name
    (`is_self_attention_name`), and may be overruled on an instance.
    """

    self_attention: bool | None = None


def carried_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    *,
    attn_mask: Tensor | None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the attention output [B, H, Lq, Dv] of `module`, by the tap that it carries, if any.

    Arguments and errors are those of `attn_kd.attention`.
    """
    tap = carried_tap(module)
    with _saved_out_of_reach(module):
        if tap is not None:
            return tap.attend(
                query, key, value, attn_mask=attn_mask, scale=scale, dropout_p=dropout_p
            )
        return attention(
            query, key, value, attn_mask=attn_mask, scale=scale, dropout_p=dropout_p
        ).output


def carried_tap(module: nn.Module) -> Tap | None:
    """Return the tap that `module` carries now, if any."""
    return vars(module).get(_TAP)  # quicker than getattr, with which nn.Module searches further


def carries_tap(module: nn.Module) -> bool:
    """Whether `module` must compute by `carried_attention` now: it has a tap or a reservation."""
    state = vars(module)
    return _TAP in state or state.get(_RESERVATIONS) is not None


@contextmanager
def carried_taps(entries: Iterable[tuple[nn.Module, Tap]]) -> Iterator[None]:
    """Give every module its tap for the forward pass inside; the previous ones come back after.

    The modules must compute by `carried_attention` while they carry a tap.
    """
    pairs = list(entries)
    previous = [carried_tap(module) for module, _ in pairs]
    try:
        for module, tap in pairs:
            setattr(module, _TAP, tap)
        yield
    finally:
        for (module, _), before in zip(reversed(pairs), reversed(previous), strict=True):
            if before is not None:
                setattr(module, _TAP, before)
            else:
                vars(module).pop(_TAP, None)


class _Reservations:
    """How many hold a module reserved. Copies of the module, in memory or in a file, are free."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class TapReservation:
    """Keeps a distilled layer right under activation checkpointing, until `undo`.

    Checkpointing runs a layer again during the backward pass, when the tap of its pass is gone, and
    expects it to save the same tensors for backward in the same order. The operator of a reserved
    layer therefore saves its tensors (query, key, value, output and O(Lq) statistics) out of
    checkpointing's reach: they stay in memory, the rest of the layer is recomputed as usual, and
    the second run needs neither tap nor teacher. Any number of passes may wait for their backward
    passes, in any order.

    A reservation must last from before the forward pass until after the last backward pass.
    Without the compiled kernels, what stays in memory is all that the reference backend saves,
    attention maps included. A deep or pickled copy of the layer is not reserved. `torch.compile`
    breaks the graph at a checkpointed layer that carries a tap, and refuses it with
    ``fullgraph=True``: a tap keeps its divergence beside the output.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        held = vars(module).get(_RESERVATIONS)
        if held is None:
            held = _Reservations()
            setattr(module, _RESERVATIONS, held)
        held.number += 1

    def undo(self) -> None:
        """Let the layer go."""
        held = getattr(self._module, _RESERVATIONS)
        held.number -= 1
        if not held.number:
            delattr(self._module, _RESERVATIONS)


def forget_released(module: nn.Module) -> None:
    """Drop the empty attribute that a copy of a reserved layer has."""
    if vars(module).get(_RESERVATIONS, module) is None:
        delattr(module, _RESERVATIONS)


def is_self_attention_name(path: str) -> bool:
    """Whether a module of that path attends among its own tokens, judging by its name alone.

    Cross-attention has "cross", "encoder" or "memory" in its own name (not its parents') or is
    called "multihead_attn", as in `torch.nn.TransformerDecoderLayer`.
    """
    name = path.rpartition(".")[2]
    return not any(part in name for part in _NAMES_OF_CROSS_ATTENTION)


def _saved_out_of_reach(module: nn.Module) -> AbstractContextManager[Any]:
    """Keep what is saved for backward from checkpointing, if `module` is reserved."""
    if vars(module).get(_RESERVATIONS) is None or torch.compiler.is_compiling():
        return nullcontext()
    # Detached: a saved output that knew its graph would keep the graph, and so itself, alive.
    return saved_tensors_hooks(Tensor.detach, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
