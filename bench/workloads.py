"""What is measured: the shapes, and the tensors of one attention layer with its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MANY_LOGITS = 5e7  # a head


class Shape(NamedTuple):
    """Sizes of one attention layer; student and teacher have the same head_dim D."""

    B: int
    H: int
    Lq: int
    Lk: int
    D: int

    @property
    def map_bytes(self) -> int:
        """Of one float32 attention map of all heads."""
        return 4 * self.B * self.H * self.Lq * self.Lk

    @property
    def has_many_logits(self) -> bool:
        """A comparison of one head with float64, all queries, would take minutes."""
        return self.Lq * self.Lk > MANY_LOGITS


SHAPES = {
    "paper": Shape(8, 8, 169, 169, 32),  # the paper's images: 13 × 13 tokens
    "coco": Shape(2, 8, 1064, 1064, 32),  # a COCO image at stride 32: 28 × 38 tokens
    "dc5": Shape(1, 8, 4200, 4200, 32),  # the same at stride 16 (DETR-DC5)
    "cross": Shape(8, 8, 100, 1064, 32),  # a decoder's 100 object queries
    "vit": Shape(4, 12, 1600, 1600, 64),  # a vision transformer's layer
    "video": Shape(1, 8, 16384, 16384, 32),  # spatio-temporal tokens
}
# Between and below dc5 and video, which are of the same B, H and D: one image's encoder layer with
# HW tokens.
GRID = {f"hw{HW}": Shape(1, 8, HW, HW, 32) for HW in (169, 400, 1064, 2500, 9216)}
# At shapes of so many logits a head, gradients arrive at every 31st query only, and those alone are
# compared with float64. Nobody computes less for it: no candidate looks for zeros.
GRADED_STRIDE = 31


@dataclass(frozen=True)
class Workload:
    """Inputs of one attention layer and of its teacher's, and the gradients of its outputs."""

    query: Tensor  # [B, H, Lq, D]
    key: Tensor  # [B, H, Lk, D]
    value: Tensor  # [B, H, Lk, D]
    teacher_query: Tensor  # [B, H, Lq, D]
    teacher_key: Tensor  # [B, H, Lk, D]
    teacher_lse: Tensor  # [B, H, Lq] float32 or float64
    grad_output: Tensor  # [B, H, Lq, D]
    grad_kl: Tensor  # [B, H, Lq], dtype of teacher_lse

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a candidate is called with."""
        teacher = (self.teacher_query, self.teacher_key, self.teacher_lse)
        return (self.query, self.key, self.value, *teacher)

    @property
    def shape(self) -> Shape:
        B, H, Lq, D = self.query.shape
        return Shape(B, H, Lq, self.key.shape[2], D)

    def head(self, batch: int, head: int) -> Workload:
        """One head of one image in float64, as a workload with B = H = 1."""
        return self._map(lambda tensor: tensor[batch, head][None, None].double())

    def to(self, dtype: torch.dtype) -> Workload:
        """The same numbers in another dtype."""
        return self._map(lambda tensor: tensor.to(dtype))

    def graded_rows(self) -> Tensor:
        """Indices of the queries at which gradients arrive."""
        return self.grad_kl.flatten(0, 1).ne(0).any(0).nonzero().squeeze(1)

    def rows(self, rows: Tensor, *, grad_kl_factor: float = 1.0) -> Workload:
        """The queries of these indices, with all keys."""
        keys = {name: getattr(self, name) for name in ("key", "value", "teacher_key")}
        queries = {
            name: getattr(self, name).detach()[:, :, rows]
            for name in self.__dataclass_fields__.keys() - keys.keys()
        }
        queries["grad_kl"] = grad_kl_factor * queries["grad_kl"]
        return _requiring_grad(Workload(**keys, **queries))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Workload:
        tensors = (getattr(self, name).detach() for name in self.__dataclass_fields__)
        return _requiring_grad(Workload(*(change(tensor) for tensor in tensors)))


def make_workload(
    shape: Shape, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Workload:
    """Standard normal inputs: logits of student and teacher have a standard deviation of 1.

    The numbers do not depend on the device.

    grad_kl is as large as grad_output, so that a wrong gradient of the divergence shows. Where
    there are very many logits only some queries have gradients, see `GRADED_STRIDE`.
    """
    generator = torch.Generator().manual_seed(seed)
    B, H, Lq, Lk, D = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    query, teacher_query = (normal(B, H, Lq, D).to(dtype) for _ in range(2))
    key, value, teacher_key = (normal(B, H, Lk, D).to(dtype) for _ in range(3))
    teacher_lse = _log_sum_exp(teacher_query, teacher_key)
    grad_output, grad_kl = normal(B, H, Lq, D).to(dtype), normal(B, H, Lq).to(teacher_lse.dtype)
    if shape.has_many_logits:
        graded = torch.arange(Lq, device=device) % GRADED_STRIDE == 0
        grad_output, grad_kl = grad_output * graded[:, None], grad_kl * graded
    teacher = (teacher_query, teacher_key, teacher_lse)
    return _requiring_grad(Workload(query, key, value, *teacher, grad_output, grad_kl))


def _log_sum_exp(query: Tensor, key: Tensor) -> Tensor:
    """Log-sum-exp of the scaled logits [B, H, Lq], in float32 or float64."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled, key = query.to(wide) * query.shape[-1] ** -0.5, key.to(wide)
    blocks = scaled.split(256, dim=-2)  # not the whole map at once
    return torch.cat([(rows @ key.transpose(-2, -1)).logsumexp(-1) for rows in blocks], dim=-1)


def _requiring_grad(workload: Workload) -> Workload:
    for tensor in (workload.query, workload.key, workload.value):
        tensor.requires_grad_()
    return workload
