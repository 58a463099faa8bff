"""Peak memory of the attention loss: the fused operator against eager code.

Each way is run in a process of its own, forward and backward, and the growth of its resident set
is read from the system. So the figure is what a user's machine would need, allocator and scratch
space included, and one way cannot profit from memory that the other has left behind.

``python -m attn_kd.report.memory WAY TOKENS HEADS HEAD_DIM`` prints one figure in bytes.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import attn_kd
from attn_kd.ops.backends import Call, select_backend

WAYS = ("fused", "eager")
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_EAGER_MAPS = 8  # float32 maps that eager code holds at its peak, and some room


@dataclass(frozen=True)
class AttentionMemory:
    """Peak memory of one self-attention layer with its loss, forward and backward, batch 1."""

    tokens: int
    heads: int
    head_dim: int
    backend: str  # that served the fused operator
    fused_bytes: int
    eager_bytes: int

    @property
    def map_bytes(self) -> int:
        """One float32 attention map [heads, tokens, tokens]."""
        return 4 * self.heads * self.tokens**2


def measure_attention_memory(
    *, tokens: int = 4200, heads: int = 8, head_dim: int = 32
) -> AttentionMemory | None:
    """Measure both ways; ``None`` where the system does not tell, or too little memory is free.

    The default sizes are those of one image in DETR-DC5: 8 heads over 4200 tokens. There are fewer
    tokens where eager code would need more memory than is free.
    """
    if not _STATUS.exists():
        return None
    affordable = math.isqrt(_proc_bytes(_MEMORY, "MemAvailable") // (4 * heads * _EAGER_MAPS))
    tokens = min(tokens, affordable)
    try:
        peaks = {way: _measure_in_subprocess(way, tokens, heads, head_dim) for way in WAYS}
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        warnings.warn(f"the peak memory could not be measured: {reason[0]}", stacklevel=2)
        return None
    backend = select_backend(None, Call(torch.device("cpu"), (head_dim,)))
    return AttentionMemory(tokens, heads, head_dim, backend, peaks["fused"], peaks["eager"])


def _measure_in_subprocess(way: str, tokens: int, heads: int, head_dim: int) -> int:
    sizes = [str(size) for size in (tokens, heads, head_dim)]
    command = [sys.executable, "-m", "attn_kd.report.memory", way, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def _growth_of_peak(way: str, tokens: int, heads: int, head_dim: int) -> int:
    """Bytes by which one forward and backward raises this process's peak resident set."""
    loss = {"fused": _fused_loss, "eager": _eager_loss}[way]
    loss(*_inputs(tokens=8, heads=heads, head_dim=head_dim)).backward()  # loads what is lazy
    inputs = _inputs(tokens, heads, head_dim)
    before = _proc_bytes(_STATUS, "VmRSS")
    loss(*inputs).backward()
    return _proc_bytes(_STATUS, "VmHWM") - before


def _inputs(tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    """Query, key, value, teacher query and teacher key, each [1, heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, head_dim)
    tensors = [torch.randn(shape, generator=generator) for _ in range(5)]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def _fused_loss(
    query: Tensor, key: Tensor, value: Tensor, teacher_query: Tensor, teacher_key: Tensor
) -> Tensor:
    result = attn_kd.attention_kl(query, key, value, teacher_query, teacher_key)
    return result.output.sum() + result.kl.mean()


def _eager_loss(
    query: Tensor, key: Tensor, value: Tensor, teacher_query: Tensor, teacher_key: Tensor
) -> Tensor:
    """The usual code, which stores the maps [1, heads, tokens, tokens]."""
    scale = query.shape[-1] ** -0.5
    log_attention = (scale * query @ key.transpose(-2, -1)).log_softmax(dim=-1)
    with torch.no_grad():
        logits = scale * teacher_query @ teacher_key.transpose(-2, -1)
        log_teacher = logits.log_softmax(dim=-1)
    attention = log_attention.exp()
    divergence = (attention * (log_attention - log_teacher)).sum(dim=-1)
    return (attention @ value).sum() + divergence.mean()


def _proc_bytes(file: Path, field: str) -> int:
    # Not getrusage: on Linux its maximum is inherited from the parent across fork and exec.
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{file} has no field {field}")


if __name__ == "__main__":
    sys.stdout.write(f"{_growth_of_peak(sys.argv[1], *map(int, sys.argv[2:]))}\n")
