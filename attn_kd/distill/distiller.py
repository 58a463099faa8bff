"""Runs a frozen teacher and a student side by side and collects their attention divergence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attn_kd.distill.layers import LayerPair, pair_layers
from attn_kd.distill.recorder import TeacherPass, TeacherRecorder
from attn_kd.distill.tapped import TappedModel
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord, FuseTap, mean_divergence
from attn_kd.ops.checks import check_options


@dataclass(frozen=True)
class DistillationResult:
    """What one pass through teacher and student gave.

    `attention_kl` is 0-dimensional and differentiable in the student: for every pair of layers the
    mean divergence over heads and over the rows that count (those that see a key and, in
    self-attention, are not padding themselves), averaged over the pairs.
    """

    attention_kl: Tensor
    attention_kl_per_layer: dict[str, Tensor]  # by student path, 0-dimensional
    student: Any  # the student's own output (a transformers ModelOutput)
    teacher: Any  # the teacher's, without gradient


class AttentionDistiller:
    """Attention distillation from a frozen teacher (Rubin et al. 2021, eq. 3) without any map.

    Calling the distiller runs the teacher without gradient, recording query, key and log-sum-exp
    of its layers, and then the student, whose layers compute attention and divergence in one
    fused operator::

        with AttentionDistiller(teacher, student) as distiller:
            for batch in loader:
                loss = distillation_loss(distiller(**batch), alpha=0.7).total
                loss.backward()

    While a distiller is open the distilled layers' attention implementation is "attn_kd" and the
    teacher is in evaluation mode; `close` puts both back (several distillers may share a model; the
    last one restores it). Nothing else of either model is touched: no hooks, no attributes, and
    `requires_grad` stays as it is. The other layers run as "sdpa" meanwhile where their own
    implementation does not take attn_kd's masks ("eager", say): results may then differ in their
    last bits, and no attention maps are returned. Close only after the last backward pass:
    activation checkpointing recomputes layers there.

    Args:
        teacher: a transformers model, or a wrapper that passes keyword arguments on to one.
        student: likewise; another model than the teacher.
        layers: {student path: teacher path} of attention modules, as in `named_modules`. None
            pairs the final encoder self-attention of both.
        divergence: "reverse_kl" (the paper's KL(student ‖ teacher)) or "forward_kl".
        head_reduction: "none": heads are compared one to one, so both need as many.

    Raises:
        InputError: a path is wrong (near ones are suggested), or the models cannot be paired.
        NotImplementedError: an option that this release does not have.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: Mapping[str, str] | None = None,
        divergence: str = "reverse_kl",
        head_reduction: str = "none",
    ) -> None:
        check_options(divergence, head_reduction, 0.0)
        if teacher is student:
            raise InputError(
                "teacher and student are one model; expected two (copy.deepcopy makes another)"
            )
        self.teacher = teacher
        self.student = student
        self._pairs = pair_layers(student, teacher, layers)
        self._divergence = divergence
        self._head_reduction = head_reduction
        with ExitStack() as changes:
            # Two student layers may learn from one teacher layer.
            recorded = dict.fromkeys(pair.teacher_path for pair in self._pairs)
            self._recorder = changes.enter_context(TeacherRecorder(teacher, recorded))
            students = {pair.student_path: pair.student for pair in self._pairs}
            self._tapped = TappedModel("student", student, students)
            changes.callback(self._tapped.close)
            self._changes = changes.pop_all()
        self._open = True

    @property
    def layers(self) -> dict[str, str]:
        """The distilled layers, {student path: teacher path}."""
        return {pair.student_path: pair.teacher_path for pair in self._pairs}

    def __call__(self, **batch: Any) -> DistillationResult:
        """Run teacher and student on `batch`, the keyword arguments of their forward pass.

        The teacher is not given the `labels`: its own loss is of no use.

        Raises:
            InputError: the pair's maps differ in size, or in heads; or a layer did not run.
        """
        return self.run(batch)

    def run(
        self,
        batch: Mapping[str, Any],
        *,
        teacher_inputs: Mapping[str, Any] | None = None,
        teacher_pass: TeacherPass | None = None,
        student: nn.Module | None = None,
    ) -> DistillationResult:
        """Like calling the distiller, with more room.

        Args:
            batch: keyword arguments of the student's forward pass.
            teacher_inputs: those of the teacher's, where they differ (a clip instead of a frame,
                cached features); None: `batch` without `labels`. Both maps are taken under the
                student's mask, so the teacher's log-sum-exp is then computed anew. Grids are
                compared by their number of tokens; that 4 x 6 does not meet 6 x 4 is the caller's
                duty.
            teacher_pass: what the teacher gave for these images before; it is not run then. A
                record's log-sum-exp must belong to the mask that the student has, or be None.
            student: the student in a wrapper (DistributedDataParallel, torch.compile), to be called
                in its place; it must contain the distiller's own student.

        Raises:
            InputError: as for a call; or the given pass lacks a layer.
        """
        if not self._open:
            raise InputError("the distiller is closed; expected an open one")
        given = self._teacher_pass(batch, teacher_inputs, teacher_pass)
        taps = {pair.student_path: self._fuse_tap(pair, given.records) for pair in self._pairs}
        output = self._tapped.run(batch, taps, through=student)
        per_layer = {path: self._collect(tap) for path, tap in taps.items()}
        mean = torch.stack(list(per_layer.values())).mean()
        return DistillationResult(mean, per_layer, output, given.output)

    def close(self) -> None:
        """Leave both models as they were found. Closing again does nothing."""
        if self._open:
            self._open = False
            self._changes.close()

    def __enter__(self) -> AttentionDistiller:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _teacher_pass(
        self,
        batch: Mapping[str, Any],
        teacher_inputs: Mapping[str, Any] | None,
        teacher_pass: TeacherPass | None,
    ) -> TeacherPass:
        """Return the pass that was given, or the teacher's on its own inputs or on the batch."""
        if teacher_pass is not None:
            if teacher_inputs is not None:
                raise InputError("teacher_inputs and teacher_pass are both given; expected one")
            for path in self._recorder.paths:
                if path not in teacher_pass.records:
                    known = ", ".join(map(repr, teacher_pass.records)) or "none"
                    raise InputError(
                        f"the given teacher_pass has no record of layer {path!r}; it has {known}"
                    )
            return teacher_pass
        if teacher_inputs is not None:
            return self._recorder(teacher_inputs).without_lse()
        return self._recorder({name: value for name, value in batch.items() if name != "labels"})

    def _fuse_tap(self, pair: LayerPair, records: Mapping[str, AttentionRecord]) -> FuseTap:
        return FuseTap(
            records[pair.teacher_path],
            layer=pair.student_path,
            teacher_layer=pair.teacher_path,
            self_attention=pair.self_attention,
            divergence=self._divergence,
            head_reduction=self._head_reduction,
        )

    def _collect(self, tap: FuseTap) -> Tensor:
        """Return the mean divergence that the student's layer left in its tap."""
        tap.close()
        if tap.kl is None:
            raise self._tapped.did_not_run(tap.layer)
        if torch.is_grad_enabled() and not tap.grad_enabled:
            raise InputError(
                f"student layer {tap.layer!r} ran without gradient, so its divergence has none; "
                "reentrant activation checkpointing does that; expected use_reentrant=False"
            )
        return mean_divergence(tap.kl, tap.rows)
