"""The settings of a run in the terms of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from attn_kd.training.config import TrainingConfig

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def training_arguments(
    config: TrainingConfig, checkpoints: Path, device: torch.device | str | None, **changes: Any
) -> TrainingArguments:
    """Arguments for a run of ``config`` that keeps its checkpoints in a folder.

    Args:
        device: ``None`` for the GPU if there is one; in a distributed run each process has its own.
        changes: arguments that differ from what the configuration says.
    """
    use_cpu = device is not None and torch.device(device).type == "cpu"
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device))
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "use_cpu": use_cpu,
        "per_device_train_batch_size": config.batch_size,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup,
        "lr_scheduler_type": _SCHEDULES[config.schedule],
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.amp == "bf16",
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the trainer stops at a loss that is not finite
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "eval_strategy": "no" if config.eval_steps is None else "steps",
        "eval_steps": config.eval_steps,
        "seed": config.seed,
        "dataloader_num_workers": config.num_workers,
        "dataloader_pin_memory": torch.cuda.is_available() and not use_cpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,  # every one is used in every step
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**values, **changes})
    if arguments.n_gpu > 1:
        # One process drives one GPU; for several there is torchrun. Trainer would else split every
        # batch over all it sees (torch.nn.DataParallel), copies of the model that share no hooks.
        arguments._n_gpu = 1
    return arguments
