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
Result = tuple[Tensor | None, ...]  # of `forward` or `forward_backward`
Errors = dict[str, dict[str, float]]  # candidate -> quantity -> relative error


class Checker:
    """Compares what candidates return for one workload with exact values, computed when needed.

    The candidates compute all heads, at the size that is timed; the first and the last head are
    compared, in the queries at which gradients arrive.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rows = workload.graded_rows()
        self._exact: dict[tuple[int, int, bool], tuple[Tensor, ...]] = {}

    def errors(self, result: Result) -> dict[str, float]:
        """|x - exact| / |exact| (Frobenius) of each quantity; the larger of two heads'.

        "kl" is missing for a candidate that computes no divergence, gradients after `forward`.
        """
        B, H = self._workload.query.shape[:2]
        with_divergence = result[1] is not None
        errors: dict[str, list[float]] = {}
        for batch, head in {(0, 0), (B - 1, H - 1)}:
            exact = self._exact_head(batch, head, with_divergence)
            for name, found, y in zip(QUANTITIES, result, exact, strict=False):
                if found is not None:
                    x = found[batch, head]
                    if name in ("output", "kl", "grad_query"):
                        x = x[self._rows]
                    error = (x.double() - y[0, 0]).norm() / y.norm()
                    errors.setdefault(name, []).append(error.item())
        # torch's maximum keeps a NaN, Python's may drop it
        return {name: torch.tensor(values).max().item() for name, values in errors.items()}

    def check(self, result: Result) -> dict[str, float]:
        """`errors`, all within the tolerance for the workload's dtype.

        Raises:
            AssertionError: an error is larger, or not a number.
        """
        errors = self.errors(result)
        tolerance = TOLERANCES[self._workload.query.dtype]
        for quantity, error in errors.items():
            assert error <= tolerance, (
                f"{quantity} is {error:.1e} off; at most {tolerance:.0e} expected"
            )
        return errors

    def _exact_head(self, batch: int, head: int, with_divergence: bool) -> tuple[Tensor, ...]:
        key = (batch, head, with_divergence)
        if key not in self._exact:
            one = self._workload.head(batch, head)
            self._exact[key] = exact_head(one, with_divergence=with_divergence)
        return self._exact[key]


def exact_head(head: Workload, *, with_divergence: bool, block: int = 1024) -> tuple[Tensor, ...]:
    """Output, divergence and gradients of one float64 head, by eager code on blocks of queries.

    Without divergence, the gradients are those of the attention output alone. The queries are those
    at which gradients arrive.
    """
    by_query: list[tuple[Tensor, ...]] = []  # per block output, divergence and gradient of query
    key_gradient, value_gradient = torch.zeros_like(head.key), torch.zeros_like(head.value)
    weight = 1.0 if with_divergence else 0.0
    for indices in head.graded_rows().split(block):
        rows = head.rows(indices, grad_kl_factor=weight)
        results = (x for x in forward_backward(eager, rows) if x is not None)
        *values, grad_key, grad_value = (x.detach() for x in results)
        by_query.append(tuple(values))
        key_gradient += grad_key
        value_gradient += grad_value
    together = (torch.cat(blocks, dim=2) for blocks in zip(*by_query, strict=True))
    return (*together, key_gradient, value_gradient)


def check(candidate: Candidate, workload: Workload) -> dict[str, float]:
    """Check the candidate's forward without gradients and its forward with backward."""
    checker = Checker(workload)
    checker.check(forward(candidate, workload))
    return checker.check(forward_backward(candidate, workload))
