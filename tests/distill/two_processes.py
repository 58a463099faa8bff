"""Distillation steps on one half of a batch: run by `torchrun` with two processes.

``python -m torch.distributed.run --nproc_per_node=2 -m tests.distill.two_processes FILE`` writes
{case: gradients} of the first process to FILE, after DistributedDataParallel has averaged them, and
the largest difference between the two processes' gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attn_kd.distill import AttentionDistiller
from tests.tiny_detr import checkpoint_activations, tiny_batch, tiny_detr

EVERY_KIND = {"layers": "all", "kinds": ("encoder_self", "decoder_self", "decoder_cross")}
CASES: dict[str, dict[str, Any]] = {
    "last layer": {},
    "every layer": EVERY_KIND,
    "checkpointed": {**EVERY_KIND, "checkpointing": True},
    "accumulated": {"accumulate": True},
}


def models() -> tuple[nn.Module, nn.Module]:
    """Return a teacher and a student, the same in every process."""
    return tiny_detr(seed=1).double(), tiny_detr(seed=2).double().train()


def joint_batch() -> dict[str, Tensor]:
    """Return four images without padding, so that all have as many rows."""
    halves = [tiny_batch(padded=False, dtype=torch.float64, seed=seed) for seed in (0, 1)]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def loss_of(distiller: AttentionDistiller, batch: dict[str, Tensor], student: nn.Module) -> Tensor:
    """Return a loss to which every parameter contributes: a mean over images."""
    result = distiller.run(batch, student=student)
    outputs = (result.student.logits, result.student.pred_boxes)
    return result.attention_kl + sum(output.square().mean() for output in outputs)


def micro_batches(batch: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield a batch in equal parts."""
    for index in range(count):
        yield {name: tensor.chunk(count)[index] for name, tensor in batch.items()}


def gradients_of_case(
    batch: dict[str, Tensor],
    *,
    checkpointing: bool = False,
    accumulate: bool = False,
    distributed: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the student's gradients after one optimisation step's worth of backward passes."""
    teacher, student = models()
    if checkpointing:
        checkpoint_activations(student, {"use_reentrant": False})
    parts = list(micro_batches(batch, 2)) if accumulate else [batch]
    with AttentionDistiller(teacher, student, **options) as distiller:
        replica = DistributedDataParallel(student) if distributed else student
        for number, part in enumerate(parts, start=1):
            with ExitStack() as stack:
                if distributed and number < len(parts):
                    stack.enter_context(replica.no_sync())
                (loss_of(distiller, part, replica) / len(parts)).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def main(path: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    half = list(micro_batches(joint_batch(), 2))[rank]
    found = {name: gradients_of_case(half, **options) for name, options in CASES.items()}
    spread = 0.0
    for gradients in found.values():
        for gradient in gradients.values():
            both = [torch.empty_like(gradient) for _ in range(2)]
            torch.distributed.all_gather(both, gradient)
            spread = max(spread, (both[0] - both[1]).abs().max().item())
    if rank == 0:
        torch.save({"gradients": found, "spread": spread}, path)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
