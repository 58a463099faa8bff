"""Whether a candidate computes the right thing: its values and gradients against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import Candidate, eager, forward, forward_backward
from bench.workloads import Workload

QUANTITIES = ("output", "kl", "grad_query", "grad_key", "grad_value")
# Relative errors that no working candidate exceeds. Eager code in bfloat16 rounds its logits and
# maps to 8 bits (its gradients are 1.5 % off); the others keep them in float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def relative_errors(candidate: Candidate, workload: Workload) -> dict[str, float]:
    """|x - exact| / |exact| (Frobenius) of values and gradients; the larger of two heads'.

    The candidate computes all heads, at the size that is timed; the first and the last are
    compared. "kl" is missing for a candidate that computes no divergence.
    """
    output, divergence = forward(candidate, workload)
    gradients = forward_backward(candidate, workload)
    found = (output, divergence, *gradients)
    B, H = workload.query.shape[:2]
    errors: dict[str, list[float]] = {}
    for batch, head in {(0, 0), (B - 1, H - 1)}:
        exact = exact_head(workload.head(batch, head), with_divergence=divergence is not None)
        for name, x, y in zip(QUANTITIES, found, exact, strict=True):
            if x is not None:
                error = (x[batch, head].double() - y[0, 0]).norm() / y.norm()
                errors.setdefault(name, []).append(error.item())
    # torch's maximum keeps a NaN, Python's may drop it
    return {name: torch.tensor(values).max().item() for name, values in errors.items()}


def exact_head(
    head: Workload, *, with_divergence: bool, block: int = 1024
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, divergence and gradients of one float64 head, by eager code on blocks of queries.

    Without divergence, the gradients are those of the attention output alone.
    """
    outputs, divergences, query_gradients = [], [], []
    key_gradient, value_gradient = torch.zeros_like(head.key), torch.zeros_like(head.value)
    weight = 1.0 if with_divergence else 0.0
    for start in range(0, head.query.shape[2], block):
        rows = head.rows(slice(start, start + block), grad_kl_factor=weight)
        output, divergence = forward(eager, rows)
        grad_query, grad_key, grad_value = forward_backward(eager, rows)
        outputs.append(output)
        divergences.append(divergence)
        query_gradients.append(grad_query)
        key_gradient += grad_key
        value_gradient += grad_value
    rows_together = (torch.cat(x, dim=2) for x in (outputs, divergences, query_gradients))
    return (*rows_together, key_gradient, value_gradient)


def check(candidate: Candidate, workload: Workload) -> dict[str, float]:
    """`relative_errors`, all within the tolerance for the workload's dtype.

    Raises:
        AssertionError: an error is larger, or not a number.
    """
    errors = relative_errors(candidate, workload)
    tolerance = TOLERANCES[workload.query.dtype]
    for quantity, error in errors.items():
        assert error <= tolerance, (
            f"{quantity} is {error:.1e} off; at most {tolerance:.0e} expected"
        )
    return errors
