"""Every kind of call for which kernels have code of their own: what changes in sizes, and options.

Tests run over KINDS where a property must hold of each: with small tiles, in a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from attn_kd.ops import philox
from tests.ops import explicit
from tests.ops.cases import (
    Cotangents,
    Inputs,
    Results,
    Sizes,
    random_cotangents,
    random_inputs,
    run_backend,
)

SEED = 7  # of the noise, where a kind has any


class Kind(NamedTuple):
    """What is special about a call."""

    sizes: dict[str, int]
    options: Callable[[Inputs], dict[str, Any]]


def _given_lse(inputs: Inputs) -> dict[str, Any]:
    return {"teacher_lse": explicit.teacher_lse(*inputs.to(torch.float64)[3:]).float()}


def _mask(rows: bool, additive: bool) -> Callable[[Inputs], dict[str, Any]]:
    def options(inputs: Inputs) -> dict[str, Any]:
        batch, _, queries, _ = inputs.query.shape
        visible = torch.rand(batch, 1, queries if rows else 1, inputs.key.shape[2]) > 0.3
        if additive:
            visible = torch.where(visible, torch.randn(visible.shape), float("-inf"))
        return {"attn_mask": visible}

    return options


def _constant(**options: Any) -> Callable[[Inputs], dict[str, Any]]:
    return lambda _inputs: options


KINDS = {
    "reverse_kl": Kind({}, _constant()),
    "forward_kl": Kind({}, _constant(divergence="forward_kl")),
    "js": Kind({}, _constant(divergence="js")),
    "mse": Kind({}, _constant(divergence="mse")),
    "given teacher_lse": Kind({}, _given_lse),
    "averaged heads": Kind({"Ht": 3}, _constant(head_reduction="mean")),
    "groups": Kind({"G": 3}, _constant()),
    "groups in two passes": Kind({"G": 3}, _constant(divergence="js")),
    "averaged heads and groups": Kind({"Ht": 1, "G": 2}, _constant(head_reduction="mean")),
    "key padding": Kind({}, _mask(rows=False, additive=False)),
    "mask of pairs": Kind({}, _mask(rows=True, additive=False)),
    "additive mask": Kind({}, _mask(rows=True, additive=True)),
    "dropout": Kind({}, _constant(dropout_p=0.4)),
    "dropout in two passes": Kind({}, _constant(dropout_p=0.4, divergence="mse")),
}


class Case(NamedTuple):
    """A call of some kind, with the gradients that arrive."""

    inputs: Inputs
    cotangents: Cotangents
    options: dict[str, Any]

    def step(self, backend: str) -> Results:
        """Results and gradients."""
        return run_backend(backend, self.inputs, self.cotangents, **self.options)

    def seeded_step(self, backend: str) -> Results:
        """Likewise, under the noise of SEED."""
        torch.manual_seed(SEED)
        return self.step(backend)

    def explicit_options(self) -> dict[str, Any]:
        """The options of `explicit.attention_kl`, which is told what the noise of SEED keeps."""
        if "dropout_p" not in self.options:
            return self.options
        torch.manual_seed(SEED)
        seed = philox.draw_seed(torch.get_default_device())
        shape = (*self.inputs.query.shape[:3], self.inputs.key.shape[2])
        return {**self.options, "kept": philox.keep_mask(seed, self.options["dropout_p"], shape)}


def case_of(kind: Kind, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Case:
    """Random tensors for a call of that kind."""
    sizes = sizes._replace(**kind.sizes)
    inputs = random_inputs(sizes, dtype)
    options = kind.options(inputs)
    return Case(
        inputs, random_cotangents(sizes, dtype, options.get("head_reduction", "none")), options
    )
