"""Taps: how one forward pass listens to, or distils, single attention layers of a model.

A tap takes the place of the attention operator in one layer and lives as long as one pass. There
are two ways to a layer. Models that hand keyword arguments down to their attention layers (those
of transformers) are given the taps as the argument `TAPS_ARGUMENT`: no hook, no attribute on a
module, no global. Activation checkpointing keeps a layer's keyword arguments, so a layer that is
recomputed during the backward pass meets the tap, and the teacher's record, of its own pass. For
other models, the attention module carries its tap itself: see `attn_kd.nn.carriers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from attn_kd.errors import InputError
from attn_kd.nn.masks import only_row, visible
from attn_kd.ops import attention, attention_kl

TAPS_ARGUMENT = "attn_kd_taps"


class AttentionRecord(NamedTuple):
    """What distillation needs of a teacher's layer: its logits' factors, never its map."""

    query: Tensor  # [B, Ht, Lq, Dt]
    key: Tensor  # [B, Ht, group * Lk, Dt]
    lse: Tensor | None  # [B, Ht, Lq], float32 or float64, under the teacher's mask; None: unknown
    scale: float | None  # None: Dt ** -0.5
    group: int = 1  # consecutive teacher keys that are compared with one key of the student
    attn_mask: Tensor | None = None  # of the teacher, as `attention` takes it; None: it had none
    mask_known: bool = False  # False: attn_mask says nothing, and lse is under the student's mask

    def to(self, device: torch.device) -> AttentionRecord:
        """Return the record on `device`."""
        query, key = self.query.to(device), self.key.to(device)
        lse, mask = (None if x is None else x.to(device) for x in (self.lse, self.attn_mask))
        return self._replace(query=query, key=key, lse=lse, attn_mask=mask)

    def lse_under(self, attn_mask: Tensor | None) -> Tensor | None:
        """Return the log-sum-exp for the keys that `attn_mask`, the student's, shows, if known."""
        if self.mask_known and not _known_equal(self.attn_mask, attn_mask):
            return None
        return self.lse


#: Makes a teacher's record comparable with a student's query [B, H, Lq, D] and key [B, H, Lk, D].
RecordFit = Callable[[AttentionRecord, Tensor, Tensor], AttentionRecord]


class Tap(Protocol):
    """Computes a layer's attention in place of the plain operator."""

    def attend(
        self,
        query: Tensor,  # [B, H, Lq, D]
        key: Tensor,  # [B, H, Lk, D]
        value: Tensor,  # [B, H, Lk, Dv]
        *,
        attn_mask: Tensor | None,
        scale: float | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Return the attention output [B, H, Lq, Dv]."""
        ...


class AttentionTaps:
    """The taps of one forward pass, by the module they are for.

    `untapped` names the attention implementation that every other layer keeps.
    """

    __slots__ = ("_entries", "untapped")

    def __init__(self, entries: Iterable[tuple[nn.Module, Tap]], untapped: str) -> None:
        self._entries = tuple(entries)
        self.untapped = untapped

    def find(self, module: nn.Module) -> Tap | None:
        """Return the tap of `module`, if it has one."""
        for tapped, tap in self._entries:
            if tapped is module:
                return tap
        return None


class RecordTap:
    """Plain attention that keeps query, key, log-sum-exp and mask, detached: the teacher's side.

    `record` is None until the layer has run.
    """

    __slots__ = ("layer", "record")

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.record: AttentionRecord | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        scale: float | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Return the attention output and keep the record."""
        if self.record is not None:
            raise _ran_twice("teacher", self.layer)
        output, lse = attention(
            query, key, value, attn_mask=attn_mask, scale=scale, dropout_p=dropout_p
        )
        # Autocast may have made the operator compute in another dtype than it was handed; the
        # LSE belongs to the rounded logits, so the rounded factors must be kept with it.
        self.record = AttentionRecord(
            query.detach().to(output.dtype),
            key.detach().to(output.dtype),
            lse.detach(),
            scale,
            attn_mask=None if attn_mask is None else attn_mask.detach(),
            mask_known=True,
        )
        return output


class FuseTap:
    """Attention fused with its divergence from a teacher's record: the student's side.

    The record may be of other heads or tokens than the student's layer if `fit` mends that.
    `kl` [B, H, Lq] and `rows` (bool, broadcastable to kl: the rows that count; None for all) are
    None until the layer has run. Runs after `close` are recomputations by activation
    checkpointing; they compute the same and store nothing.
    """

    __slots__ = (
        "_closed",
        "_divergence",
        "_fit",
        "_head_reduction",
        "_record",
        "_self_attention",
        "grad_enabled",
        "kl",
        "layer",
        "rows",
        "teacher_layer",
    )

    def __init__(
        self,
        record: AttentionRecord,
        *,
        layer: str,
        teacher_layer: str,
        self_attention: bool,
        divergence: str,
        head_reduction: str,
        fit: RecordFit | None = None,
    ) -> None:
        self.layer = layer
        self.teacher_layer = teacher_layer
        self.kl: Tensor | None = None
        self.rows: Tensor | None = None
        self.grad_enabled = False
        self._record = record
        self._self_attention = self_attention
        self._divergence = divergence
        self._head_reduction = head_reduction
        self._fit = fit
        self._closed = False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        scale: float | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Return the attention output and keep the divergence of every row."""
        if self.kl is not None and not self._closed:
            raise _ran_twice("student", self.layer)
        record = self._comparable_record(query, key)
        output, kl, _ = attention_kl(
            query,
            key,
            value,
            record.query,
            record.key,
            teacher_lse=record.lse_under(attn_mask),
            attn_mask=attn_mask,
            scale=scale,
            teacher_scale=record.scale,
            divergence=self._divergence,
            head_reduction=self._head_reduction,
            dropout_p=dropout_p,
        )
        if not self._closed:
            self.kl = kl
            self.rows = distilled_rows(attn_mask, self_attention=self._self_attention)
            self.grad_enabled = torch.is_grad_enabled()
        return output

    def close(self) -> None:
        """Take no further result: the forward pass is over."""
        self._closed = True

    def _comparable_record(self, query: Tensor, key: Tensor) -> AttentionRecord:
        """Return the teacher's record, fitted, on the student's device, after all checks."""
        batch, teacher_batch = query.shape[0], self._record.query.shape[0]
        if batch != teacher_batch:
            raise InputError(
                f"the teacher ran on {teacher_batch} images, the student on {batch}; "
                "expected the same batch"
            )
        if self._self_attention and query.shape[2] != key.shape[2]:
            raise InputError(
                f"student layer {self.layer!r} passes for self-attention, but attends from "
                f"{query.shape[2]} to {key.shape[2]} tokens; if it is cross-attention, say so: "
                "module.self_attention = False"
            )
        record = self._record.to(query.device)
        if self._fit is not None:
            record = self._fit(record, query, key)
        tokens = (query.shape[2], record.group * key.shape[2])
        teacher_tokens = (record.query.shape[2], record.key.shape[2])
        if tokens != teacher_tokens:
            raise InputError(
                f"student layer {self.layer!r} attends from {query.shape[2]} to {key.shape[2]} "
                f"tokens, teacher layer {self.teacher_layer!r} from {self._record.query.shape[2]} "
                f"to {self._record.key.shape[2]}; expected maps of one size (same image size and "
                'stride), or alignment="resample" or "group"'
            )
        heads, teacher_heads = query.shape[1], record.query.shape[1]
        if heads != teacher_heads and self._head_reduction == "none":
            raise InputError(
                f"student layer {self.layer!r} has {heads} heads, teacher layer "
                f"{self.teacher_layer!r} has {teacher_heads}; expected as many, for head_reduction="
                '"none" pairs them one to one; a head_map pairs others, "mean" compares averages'
            )
        return record


def distilled_rows(attn_mask: Tensor | None, *, self_attention: bool) -> Tensor | None:
    """Return which query rows a divergence is averaged over; bool, broadcastable to [B, H, Lq].

    A row counts if it may attend to some key and is not padding itself. Queries have no padding
    mask of their own, but in self-attention they are the keys: a position that no query may attend
    to is padding, and its row (which does see keys) is left out. None: every row counts.
    """
    if attn_mask is None:
        return None
    shown = visible(attn_mask)
    shown = shown.reshape((1,) * (4 - shown.dim()) + shown.shape)
    rows = shown.any(dim=-1)  # [B or 1, H or 1, Lq or 1]
    if self_attention:
        rows = rows & shown.any(dim=-2)  # [B or 1, H or 1, Lk]
    return rows


def mean_divergence(kl: Tensor, rows: Tensor | None) -> Tensor:
    """Return the mean of kl [B, H, Lq] (or [B, Lq]) over rows and heads, 0 if no row counts.

    `rows` is what `distilled_rows` returned. One mean over the batch, so an image counts by its
    number of rows.
    """
    if rows is None:
        return kl.mean()
    if kl.dim() == 2:  # head-averaged maps: one row for all heads
        rows = rows.any(dim=1)
    rows = rows.expand(kl.shape)
    return kl.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def _known_equal(mask: Tensor | None, other: Tensor | None) -> bool:
    """Whether two masks are known to be equal at little cost; False where that is not clear.

    Values are compared where all queries have one row, as with padding. That waits for the device,
    so neither a traced graph nor a captured one does it.
    """
    if mask is other:
        return True
    if mask is None or other is None or torch.compiler.is_compiling():
        return False
    if mask.shape != other.shape or mask.dtype != other.dtype or mask.device != other.device:
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    rows = [only_row(x) for x in (mask, other)]
    return rows[0] is not None and rows[1] is not None and torch.equal(rows[0], rows[1])


def _ran_twice(role: str, layer: str) -> InputError:
    return InputError(
        f"{role} layer {layer!r} ran more than once in one forward pass; expected a layer that "
        "runs once"
    )
