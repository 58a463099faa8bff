"""What happens around the steps of a training: epochs counted, history written, bars, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from attn_kd.errors import InputError
from attn_kd.training.records import history_entries, write_json


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the message says where it can go on."""


@contextlib.contextmanager
def begun_again(stage: str) -> Iterator[None]:
    """Around a stage without checkpoints: Ctrl-C says that a resumed run begins it again."""
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"--resume begins {stage} again") from None


class EpochAnnouncer(TrainerCallback):
    """Tells the data set which epoch begins; its randomness depends on that."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # A resumed run begins within an epoch, at a fractional one.
        self.dataset.set_epoch(int(state.epoch or 0))


class HistoryWriter(TrainerCallback):
    """Writes ``history.json`` with every checkpoint and at the end; has the last step logged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            write_json(self.path, history_entries(state.log_history))

    on_train_end = on_save


class ProgressBar(TrainerCallback):
    """A bar on stderr with the last logged losses."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.description,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs:
            shown = {"loss": "loss", "attention_kl": "kl", "eval_mAP50": "mAP50"}
            values = {label: logs[name] for name, label in shown.items() if name in logs}
            if values:
                self.bar.set_postfix(values)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnInterrupt(TrainerCallback):
    """As a context manager around a training: the first Ctrl-C ends it at a checkpoint.

    The step that is running is finished and a checkpoint written; then the context is left by
    :class:`TrainingInterrupted`. If that step was the last one anyway nothing is raised: the
    training is complete, and only :attr:`requested` tells. A second Ctrl-C stops at once. Signals
    reach only the main thread; a training in another one is not affected.
    """

    def __init__(self) -> None:
        self.requested = False
        self._stopped = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        if self._stopped and kind is None:
            raise TrainingInterrupted("a checkpoint is written; --resume goes on from there")

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.requested and state.global_step < state.max_steps:
            self._stopped = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True


class TensorBoard(TensorBoardCallback):
    """Writes the curves of the loss for TensorBoard into a folder of the run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(SummaryWriter(log_dir=str(folder)))


def require_tensorboard() -> None:
    """Check that curves can be written.

    Raises:
        InputError: the package tensorboard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError("tensorboard is True but the package tensorboard is missing") from None
