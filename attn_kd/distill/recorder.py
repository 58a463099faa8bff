"""The teacher's side of a distillation: what its layers computed, recorded without gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attn_kd.distill.layers import attention_at
from attn_kd.distill.loans import Loans
from attn_kd.distill.tapped import TappedModel
from attn_kd.nn.taps import AttentionRecord, RecordTap


@dataclass(frozen=True)
class TeacherPass:
    """What one forward pass of a teacher gives to a student, now or (from a cache) later."""

    records: Mapping[str, AttentionRecord]  # by teacher path
    output: Any = None  # the teacher's own; `.logits` is needed for the class term alone
    image_size: tuple[int, int] | None = None  # height and width in pixels, see `image_size`

    def without_lse(self) -> TeacherPass:
        """Return the pass without log-sum-exps, for a student whose mask is another."""
        records = {path: record._replace(lse=None) for path, record in self.records.items()}
        return replace(self, records=records)


class _EvaluationMode:
    """A model in evaluation mode, until `undo` gives every module its own mode back."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        model.eval()

    def undo(self) -> None:
        for module, training in self._modes:
            module.training = training


# Recorders that are open at the same time may share a teacher.
_frozen_teachers: Loans[_EvaluationMode] = Loans()


class TeacherRecorder:
    """Runs a frozen teacher and records query, key and log-sum-exp of some of its layers.

    While it is open, the teacher is in evaluation mode and those layers compute their attention by
    attn_kd; `close` puts both back. Use it as a context manager.

    Args:
        teacher: a transformers model, or one with attention modules of `attn_kd.nn`; may be in a
            wrapper.
        paths: of the attention modules to record, as in `named_modules`.

    Raises:
        InputError: a path is wrong (near ones are suggested), or the model cannot be tapped.
    """

    def __init__(self, teacher: nn.Module, paths: Iterable[str]) -> None:
        modules = {path: attention_at(teacher, path, "teacher") for path in paths}
        self.teacher = teacher
        self.paths = tuple(modules)
        self._tapped = TappedModel("teacher", teacher, modules)
        with ExitStack() as changes:
            changes.callback(self._tapped.close)
            _frozen_teachers.take(teacher, partial(_EvaluationMode, teacher))
            changes.callback(_frozen_teachers.give_back, teacher)
            self._changes = changes.pop_all()

    def __call__(self, inputs: Mapping[str, Any]) -> TeacherPass:
        """Run the teacher on the keyword arguments of its forward pass, without gradient.

        Raises:
            InputError: a layer did not run, or ran more than once.
        """
        taps = {path: RecordTap(path) for path in self.paths}
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # somebody has called train() on it since
        with torch.no_grad():
            output = self._tapped.run(inputs, taps)
        records = {}
        for path, tap in taps.items():
            if tap.record is None:
                raise self._tapped.did_not_run(path)
            records[path] = tap.record
        return TeacherPass(records, output, image_size(inputs))

    def close(self) -> None:
        """Leave the teacher as it was found. Closing again does nothing."""
        self._changes.close()

    def __enter__(self) -> TeacherRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def image_size(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images [B, C, H, W] among a model's inputs, if it is clear.

    That is `pixel_values`, or else the only input of such a shape. A clip has no size here: how
    many of its frames are left among the tokens does not show.
    """
    candidates = [inputs["pixel_values"]] if "pixel_values" in inputs else inputs.values()
    images = [x for x in candidates if isinstance(x, Tensor) and x.is_floating_point()]
    sizes = [(x.shape[2], x.shape[3]) for x in images if x.dim() == 4]
    return sizes[0] if len(sizes) == 1 else None
