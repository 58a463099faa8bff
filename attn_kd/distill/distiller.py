"""Runs a frozen teacher and a student side by side and collects their attention divergence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attn_kd.distill.layers import LayerPair, pair_layers
from attn_kd.distill.loans import Loans
from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import (
    SwitchedImplementation,
    configuration,
    untapped_implementation,
)
from attn_kd.nn.taps import (
    TAPS_ARGUMENT,
    AttentionRecord,
    AttentionTaps,
    FuseTap,
    RecordTap,
    mean_divergence,
)
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


class _EvaluationMode:
    """A model in evaluation mode, until `undo` gives every module its own mode back."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        model.eval()

    def undo(self) -> None:
        for module, training in self._modes:
            module.training = training


# Distillers that are open at the same time may share a teacher or a student.
_frozen_teachers: Loans[_EvaluationMode] = Loans()
_switched_configs: Loans[SwitchedImplementation] = Loans()


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
        for role, model in (("teacher", teacher), ("student", student)):
            _check_passes_keywords(role, model)
        self.teacher = teacher
        self.student = student
        self._pairs = pair_layers(student, teacher, layers)
        self._divergence = divergence
        self._head_reduction = head_reduction
        with ExitStack() as changes:
            self._teacher_untapped = _switch(teacher, [p.teacher for p in self._pairs], changes)
            self._student_untapped = _switch(student, [p.student for p in self._pairs], changes)
            _frozen_teachers.take(teacher, partial(_EvaluationMode, teacher))
            changes.callback(_frozen_teachers.give_back, teacher)
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
            student: the student in a wrapper (DistributedDataParallel, torch.compile), to be called
                in its place; it must contain the distiller's own student.
        """
        if not self._open:
            raise InputError("the distiller is closed; expected an open one")
        own_inputs = teacher_inputs is not None
        if teacher_inputs is None:
            teacher_inputs = {name: value for name, value in batch.items() if name != "labels"}
        teacher_output, records = self._run_teacher(teacher_inputs)
        if own_inputs:
            records = {path: record._replace(lse=None) for path, record in records.items()}
        taps = {pair.student_path: self._fuse_tap(pair, records) for pair in self._pairs}
        run_student = self.student if student is None else student
        student_output = run_student(
            **batch,
            **_taps_argument(
                [(pair.student, taps[pair.student_path]) for pair in self._pairs],
                self._student_untapped,
            ),
        )
        per_layer = {path: _collect(tap) for path, tap in taps.items()}
        mean = torch.stack(list(per_layer.values())).mean()
        return DistillationResult(mean, per_layer, student_output, teacher_output)

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

    def _run_teacher(self, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, AttentionRecord]]:
        """Return the teacher's output and its layers' records by teacher path."""
        modules = {pair.teacher_path: pair.teacher for pair in self._pairs}
        taps = {path: RecordTap(path) for path in modules}
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # somebody has called train() on it since
        with torch.no_grad():
            output = self.teacher(
                **inputs,
                **_taps_argument(
                    [(module, taps[path]) for path, module in modules.items()],
                    self._teacher_untapped,
                ),
            )
        records = {}
        for path, tap in taps.items():
            if tap.record is None:
                raise _did_not_run("teacher", path)
            records[path] = tap.record
        return output, records

    def _fuse_tap(self, pair: LayerPair, records: Mapping[str, AttentionRecord]) -> FuseTap:
        return FuseTap(
            records[pair.teacher_path],
            layer=pair.student_path,
            teacher_layer=pair.teacher_path,
            self_attention=pair.self_attention,
            divergence=self._divergence,
            head_reduction=self._head_reduction,
        )


def _switch(model: nn.Module, modules: list[nn.Module], changes: ExitStack) -> str:
    """Make `modules` call attn_kd until `changes` closes; return what the others use meanwhile."""
    originals = []
    for module in modules:
        config = configuration(module)
        switched = _switched_configs.take(config, partial(SwitchedImplementation, model, module))
        changes.callback(_switched_configs.give_back, config)
        originals.append(switched.original)
    return untapped_implementation(originals)


def _taps_argument(entries: list[tuple[nn.Module, Any]], untapped: str) -> dict[str, AttentionTaps]:
    return {TAPS_ARGUMENT: AttentionTaps(entries, untapped)}


def _collect(tap: FuseTap) -> Tensor:
    """Return the mean divergence that the student's layer left in its tap."""
    tap.close()
    if tap.kl is None:
        raise _did_not_run("student", tap.layer)
    if torch.is_grad_enabled() and not tap.grad_enabled:
        raise InputError(
            f"student layer {tap.layer!r} ran without gradient, so its divergence has none; "
            "reentrant activation checkpointing does that; expected use_reentrant=False"
        )
    return mean_divergence(tap.kl, tap.rows)


def _did_not_run(role: str, path: str) -> InputError:
    return InputError(
        f"{role} layer {path!r} did not run, or its model does not pass keyword arguments on to "
        "its attention layers"
    )


def _check_passes_keywords(role: str, model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise InputError(
            f"{role} {type(model).__name__} takes no further keyword arguments in forward; "
            "expected a model that passes **kwargs on to its attention layers"
        )
