"""Small calls of every kernel, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m bench.sanitizer_cases
    compute-sanitizer --tool racecheck python -m bench.sanitizer_cases --backend cuda

Lengths end within a tile and tensors end with their memory, so that a kernel which reads or writes
past them is seen. Results are compared with the reference backend in float64: a sanitizer that
finds nothing wrong in kernels that compute nothing would be no news.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import attn_kd
from attn_kd.errors import InputError
from bench.devices import default_device

BATCH, HEADS, QUERIES, KEYS = 2, 2, 67, 131
TOLERANCE = 4e-2  # relative, of values and gradients in bfloat16
Case = dict[str, Any]  # arguments of attention_kl; "mask" and "head_dim" are turned into tensors

CASES: dict[str, Case] = {
    "head_dim 32": {},
    "head_dim 64": {"head_dim": 64},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "mse": {"divergence": "mse"},
    "head mean": {"head_reduction": "mean"},
    "key padding": {"mask": "keys"},
    "mask of pairs": {"mask": "pairs"},
    "dropout": {"dropout_p": 0.2},
    "head_dim 20": {"head_dim": 20},
    "head_dim 256": {"head_dim": 256},
}


def run(case: Case, device: torch.device, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, divergence and gradients of query, key and value."""
    options = dict(case)
    head_dim, kind = options.pop("head_dim", 32), options.pop("mask", None)
    generator = torch.Generator().manual_seed(0)

    def rows(length: int) -> Tensor:
        numbers = torch.randn(BATCH, HEADS, length, head_dim, generator=generator)
        return numbers.bfloat16().to(device, dtype)

    query, teacher_query = rows(QUERIES), rows(QUERIES)
    key, value, teacher_key = rows(KEYS), rows(KEYS), rows(KEYS)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.manual_seed(0)  # of dropout, which no backend draws in a way of its own
    result = attn_kd.attention_kl(
        *leaves,
        teacher_query,
        teacher_key,
        attn_mask=_mask(kind, device),
        backend=backend,
        **options,
    )
    total = result.output.sum() + result.kl.sum()
    return [result.output, result.kl, *torch.autograd.grad(total, leaves)]


def _mask(kind: str | None, device: torch.device) -> Tensor | None:
    if kind is None:
        return None
    if kind == "keys":
        return (torch.arange(KEYS) < KEYS - 40).expand(BATCH, 1, 1, KEYS).to(device)
    pairs = torch.arange(QUERIES)[:, None] + torch.arange(KEYS)
    return (pairs % 5 > 0).to(device)


def check(name: str, device: torch.device, backend: str) -> str:
    """Run a case; say "right", or why the backend refuses it.

    Raises:
        AssertionError: a value or a gradient is off.
    """
    try:
        found = run(CASES[name], device, backend, torch.bfloat16)
    except InputError as error:
        return f"refused: {error}"
    exact = run(CASES[name], device, "reference", torch.float64)
    for what, x, y in zip(("output", "kl", "query", "key", "value"), found, exact, strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error <= TOLERANCE, f"{name}: {what} is {error:.1e} off"
    return "right"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitizer_cases", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda", "cpu"))
    parser.add_argument("--device", type=torch.device, default=default_device())
    args = parser.parse_args(argv)
    verdicts = {name: check(name, args.device, args.backend) for name in CASES}
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    if "right" not in verdicts.values():
        print("nothing was run", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
