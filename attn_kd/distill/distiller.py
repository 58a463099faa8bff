"""Runs a frozen teacher and a student side by side and collects their attention divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attn_kd.distill.alignment import ALIGNMENTS, check_grid
from attn_kd.distill.fitting import ModelGrid, PairFit
from attn_kd.distill.heads import HeadMap, head_map_by_layer
from attn_kd.distill.layers import pair_layers
from attn_kd.distill.recorder import TeacherPass, TeacherRecorder, image_size
from attn_kd.distill.tapped import TappedModel
from attn_kd.errors import InputError
from attn_kd.nn.taps import FuseTap, mean_divergence
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
    teacher is in evaluation mode, with what the student shares with it (a backbone); `close` puts
    both back (several distillers may share a model; the last one restores it). Distilled layers
    that no keyword argument of the model reaches also have attributes meanwhile
    (`attn_kd.nn.carriers`). Nothing else of either model is touched: no hooks, and `requires_grad`
    stays as it is. The other layers of a transformers model run as "sdpa" meanwhile where their own
    implementation does not take attn_kd's masks ("eager", say): results may then differ in their
    last bits, and no attention maps are returned. Close only after the last backward pass:
    activation checkpointing recomputes layers there.

    Args:
        teacher: a transformers model, or one with attention modules of `attn_kd.nn`; may be in a
            wrapper.
        student: likewise; another model than the teacher.
        layers: "last" (or None) pairs the final layers of both, "all" pairs every student layer
            with a teacher layer of like depth (`attn_kd.distill.depth_map`); or {student path:
            teacher path} of attention modules, as in `named_modules`.
        divergence: one of those of `attn_kd.attention_kl`; "reverse_kl" is the paper's,
            KL(student ‖ teacher).
        head_reduction: "none" compares heads one by one, "mean" the maps averaged over heads, of
            which the two models may then have different numbers.
        kinds: of layers that "last" and "all" choose: "encoder_self" (the paper's),
            "decoder_self", "decoder_cross".
        head_map: for "none", the teacher head that each student head learns from, [m0, m1, ...];
            or {student path: such a list} for some layers. None: head i learns from head i.
        alignment: for maps over different token grids, "resample" or "group": see
            `attn_kd.distill.alignment`. Decoder self-attention has no grid and is left alone.
        teacher_grid, student_grid: (h, w) in tokens, or (T, h, w) of a clip. None: deduced from
            the size of the images and the number of tokens, where that is clear. Maps of as many
            tokens on grids that are known to differ are refused.

    Raises:
        InputError: a path is wrong (near ones are suggested), the models cannot be paired, or an
            option is unknown.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: Mapping[str, str] | str | None = None,
        divergence: str = "reverse_kl",
        head_reduction: str = "none",
        *,
        kinds: Sequence[str] = ("encoder_self",),
        head_map: HeadMap | None = None,
        alignment: str = "none",
        teacher_grid: Sequence[int] | None = None,
        student_grid: Sequence[int] | None = None,
    ) -> None:
        check_options(divergence, head_reduction, 0.0)
        if alignment not in ALIGNMENTS:
            raise InputError(
                f"alignment={alignment!r} is unknown; expected one of {', '.join(ALIGNMENTS)}"
            )
        for role, model in {"teacher": teacher, "student": student}.items():
            if not isinstance(model, nn.Module):
                raise InputError(f"{role} is {type(model).__name__}, expected a torch.nn.Module")
        if teacher is student:
            raise InputError(
                "teacher and student are one model; expected two (copy.deepcopy makes another)"
            )
        self.teacher = teacher
        self.student = student
        self._pairs = pair_layers(student, teacher, layers, kinds)
        self._divergence = divergence
        self._head_reduction = head_reduction
        self._head_maps = head_map_by_layer(head_map, self.layers, head_reduction)
        self._alignment = alignment
        self._teacher_grid = check_grid("teacher_grid", teacher_grid)
        self._student_grid = check_grid("student_grid", student_grid)
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
            InputError: the pair's maps differ in size, grid or heads, or a layer did not run.
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
                student's mask, so the teacher's log-sum-exp is then computed anew.
            teacher_pass: what the teacher gave for these images before; it is not run then. The
                log-sum-exp of a record without a mask must belong to the student's, or be None.
            student: the student in a wrapper (DistributedDataParallel, torch.compile), to be called
                in its place; it must contain the distiller's own student.

        Raises:
            InputError: as for a call; or the given pass lacks a layer.
        """
        if not self._open:
            raise InputError("the distiller is closed; expected an open one")
        given = self._teacher_pass(batch, teacher_inputs, teacher_pass)
        fits = self._fits(image_size(batch), given.image_size)
        taps = {path: self._fuse_tap(fit, given) for path, fit in fits.items()}
        output = self._tapped.run(batch, taps, through=student)
        per_layer = {path: self._collect(tap) for path, tap in taps.items()}
        for fit in fits.values():
            fit.check_same_grid(given.records[fit.pair.teacher_path])
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

    def _fits(
        self, student_image: tuple[int, int] | None, teacher_image: tuple[int, int] | None
    ) -> dict[str, PairFit]:
        """Return, by student path, what makes the teacher's records comparable in this pass."""
        student = ModelGrid("student", self._student_grid, student_image)
        teacher = ModelGrid("teacher", self._teacher_grid, teacher_image)
        return {
            pair.student_path: PairFit(
                pair, self._alignment, self._head_maps.get(pair.student_path), student, teacher
            )
            for pair in self._pairs
        }

    def _fuse_tap(self, fit: PairFit, given: TeacherPass) -> FuseTap:
        return FuseTap(
            given.records[fit.pair.teacher_path],
            layer=fit.pair.student_path,
            teacher_layer=fit.pair.teacher_path,
            self_attention=fit.pair.self_attention,
            divergence=self._divergence,
            head_reduction=self._head_reduction,
            fit=fit,
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
