"""Small calls of every kernel, for compute-sanitizer to watch.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python -m bench.sanitizer_cases
    compute-sanitizer --tool racecheck python -m bench.sanitizer_cases --backend cuda

Lengths end within a tile, so that a kernel may read or write past a tensor. memcheck sees that only
where each tensor is an allocation of its own: torch's caching allocator, which the variable turns
off, cuts tensors from larger ones. Results are compared with the reference backend in float64: a
sanitizer that finds nothing wrong in kernels that compute nothing would be no news. It runs on the
CPU, so that the sanitizer does not watch its many kernels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attn_kd
from attn_kd.errors import InputError
from attn_kd.ops import philox
from bench.devices import default_device

BATCH, HEADS, QUERIES, KEYS = 2, 2, 67, 131
TOLERANCE = 4e-2  # relative, of values and gradients in bfloat16
RESULTS = ("output", "kl", "lse", "query", "key", "value")
# Arguments of attention_kl, and how to make the others: "head_dim", "teacher_dim", "heads",
# "dtype"; "group", the teacher's keys to each of the student's; "mask" and "teacher", whose values
# `_mask` and `run` know; "grad_output", False where nothing depends on it.
Case = dict[str, Any]

CASES: dict[str, Case] = {
    "head_dim 32": {},
    "head_dim 64": {"head_dim": 64},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "mse": {"divergence": "mse"},
    "head mean": {"head_reduction": "mean"},
    "key padding": {"mask": "keys"},
    "mask of pairs": {"mask": "pairs"},
    "js, key padding": {"divergence": "js", "mask": "keys"},
    "head mean, key padding": {"head_reduction": "mean", "mask": "keys"},
    "dropout": {"dropout_p": 0.2},
    "groups": {"group": 3},
    "js, groups": {"divergence": "js", "group": 3},
    "teacher of another head_dim": {"teacher_dim": 20},
    "head_dim 20": {"head_dim": 20},
    "head_dim 256": {"head_dim": 256},
    "float16": {"dtype": torch.float16},
    "float16, head_dim 64": {"dtype": torch.float16, "head_dim": 64},
    "teacher_lse given": {"teacher": "with lse"},
    "teacher_lse given, head_dim 64": {"teacher": "with lse", "head_dim": 64},
    "no teacher": {"teacher": "none"},
    "no teacher, head_dim 64": {"teacher": "none", "head_dim": 64},
    # Two blocks of 64 rows a head: more than twice as many as a GPU has multiprocessors.
    "blocks of 64 rows": {"heads": 150},
    "blocks of 64 rows, float16": {"heads": 150, "dtype": torch.float16},
    "additive mask": {"mask": "additive"},
    "additive mask, head_dim 64": {"mask": "additive", "head_dim": 64},
    "no grad_output": {"grad_output": False},
    "no grad_output, head_dim 64": {"grad_output": False, "head_dim": 64},
    "hidden batch entry": {"mask": "entry"},
    "hidden batch entry, head_dim 64": {"mask": "entry", "head_dim": 64},
}


def run(case: Case, device: torch.device, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """What RESULTS names, on the CPU: results and gradients; kl is empty without a teacher."""
    options = {key: value for key, value in case.items() if key != "dtype"}
    head_dim, heads = options.pop("head_dim", 32), options.pop("heads", HEADS)
    teacher_dim, group = options.pop("teacher_dim", head_dim), options.pop("group", 1)
    teacher, kind = options.pop("teacher", "without lse"), options.pop("mask", None)
    needs_output = options.pop("grad_output", True)
    generator = torch.Generator().manual_seed(0)

    def rows(length: int, width: int) -> Tensor:
        numbers = torch.randn(BATCH, heads, length, width, generator=generator)
        return numbers.bfloat16().to(device, dtype)

    query, teacher_query = rows(QUERIES, head_dim), rows(QUERIES, teacher_dim)
    key, value = rows(KEYS, head_dim), rows(KEYS, head_dim)
    teacher_key = rows(group * KEYS, teacher_dim)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    options |= {"attn_mask": _mask(kind, device), "backend": backend}
    if teacher == "none":
        output, lse = attn_kd.attention(*leaves, **options)
        kl = lse.new_empty(0)
    else:
        if teacher == "with lse":
            logits = teacher_query.cpu().double() @ teacher_key.cpu().double().mT
            lse = torch.logsumexp(logits * teacher_dim**-0.5, -1)
            options["teacher_lse"] = lse.to(device, torch.promote_types(dtype, torch.float32))
        # Of dropout: a seed drawn on a GPU is another than one drawn on the CPU.
        seed = torch.tensor([1, 0], device=device)
        with mock.patch.object(philox, "draw_seed", lambda _device: seed):
            output, kl, lse = attn_kd.attention_kl(*leaves, teacher_query, teacher_key, **options)
    total = (output.sum() if needs_output else 0.0) + kl.sum()
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [tensor.detach().cpu() for tensor in (output, kl, lse, *grads)]


def _mask(kind: str | None, device: torch.device) -> Tensor | None:
    if kind is None:
        return None
    if kind == "pairs":
        pairs = torch.arange(QUERIES)[:, None] + torch.arange(KEYS)
        return (pairs % 5 > 0).to(device)
    keys = (torch.arange(KEYS) < KEYS - 40).expand(BATCH, 1, 1, KEYS).clone()
    if kind == "entry":
        keys[-1] = False
    if kind == "additive":
        keys = torch.linspace(-2.0, 2.0, KEYS).expand_as(keys).masked_fill(~keys, -torch.inf)
    return keys.to(device)


def check(name: str, device: torch.device, backend: str) -> str:
    """Run a case; say "right", or why the backend refuses it.

    Raises:
        AssertionError: a value or a gradient is off.
    """
    try:
        found = run(CASES[name], device, backend, CASES[name].get("dtype", torch.bfloat16))
    except InputError as error:
        return f"refused: {error}"
    exact = run(CASES[name], torch.device("cpu"), "reference", torch.float64)
    for what, x, y in zip(RESULTS, found, exact, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite()), f"{name}: {what} is finite elsewhere"
        x, y = x.double().nan_to_num(neginf=0.0), y.nan_to_num(neginf=0.0)  # rows that see no key
        error = (x - y).norm().item()
        assert error <= TOLERANCE * y.norm(), f"{name}: {what} is {error / y.norm():.1e} off"
    return "right"


def verdict(name: str, device: torch.device, backend: str) -> str:
    """`check`, or what is wrong: the cases after one that is not right are of interest too."""
    try:
        return check(name, device, backend)
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # a kernel that does not compile, an access that faults
        return f"failed: {type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitizer_cases", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda", "cpu"))
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="processes that take cases in turn; 0: one for each core",
    )
    args = parser.parse_args(argv)
    jobs = args.jobs or os.cpu_count() or 1
    judge = partial(verdict, device=args.device, backend=args.backend)
    verdicts = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        in_turn = map if jobs == 1 else pool.map  # no process is begun for one
        for name, said in zip(CASES, in_turn(judge, CASES), strict=True):
            # A sanitizer's words follow what was right before.
            print(f"{name}: {said}", flush=True)
            verdicts.append(said)
    if "right" not in verdicts:
        print("nothing was right", file=sys.stderr)
        return 1
    return int(any(said.startswith(("wrong:", "failed:")) for said in verdicts))


if __name__ == "__main__":
    sys.exit(main())
