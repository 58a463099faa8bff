"""torch's and attn_kd's MultiheadAttention side by side: equal weights, inputs, gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import attn_kd.nn
from attn_kd import attention

EMBED, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 5, 7

Results = dict[str, Tensor | None]


class Tokens(NamedTuple):
    """The inputs of a layer."""

    query: Tensor
    key: Tensor
    value: Tensor


def both(**options: Any) -> tuple[nn.MultiheadAttention, attn_kd.nn.MultiheadAttention]:
    """torch's layer and attn_kd's with the same weights, none of them zero; in double precision.

    `options` are those of the constructor.
    """
    options = {"dtype": torch.float64, **options}
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)  # torch's own biases are 0
    ours = attn_kd.nn.MultiheadAttention(EMBED, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cross_tokens(
    *, batch_first: bool = False, kdim: int = EMBED, vdim: int = EMBED, **options: Any
) -> Tokens:
    """Queries and other keys and values; `options` are dtype and the like."""
    options = {"dtype": torch.float64, **options}
    shapes = ((QUERIES, BATCH, EMBED), (KEYS, BATCH, kdim), (KEYS, BATCH, vdim))
    tokens = (torch.randn(shape, **options) for shape in shapes)
    return Tokens(*(x.transpose(0, 1) if batch_first else x for x in tokens))


def self_tokens(*, batch_first: bool = False, **options: Any) -> Tokens:
    """One tensor in all three places."""
    query = cross_tokens(batch_first=batch_first, **options).query
    return Tokens(query, query, query)


def padding(keys: int = KEYS) -> Tensor:
    """A key padding mask [BATCH, keys], True = ignore: no key, the last, the last two."""
    return torch.arange(keys) >= keys - torch.arange(BATCH)[:, None]


def additive(mask: Tensor) -> Tensor:
    """The mask as float64: -inf for what is ignored, and a bias on the rest."""
    bias = torch.randn(mask.shape, dtype=torch.float64)
    return bias.masked_fill(mask, float("-inf"))


def run(layer: nn.Module, tokens: Tokens, **arguments: Any) -> Results:
    """Call the layer; return output, map, and the gradients of parameters and tokens."""
    leaves = {id(x): x.detach().requires_grad_() for x in tokens}  # stays one if it was one
    output, weights = layer(*(leaves[id(x)] for x in tokens), **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    if weights is not None:
        cotangent = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        loss = loss + (weights * cotangent).sum()
    inputs = [*layer.parameters(), *leaves.values()]
    gradients = torch.autograd.grad(loss, inputs)
    names = [name for name, _ in layer.named_parameters()] + [str(i) for i in range(len(leaves))]
    results = {f"grad of {name}": g for name, g in zip(names, gradients, strict=True)}
    return {"output": output.detach(), "weights": _detached(weights), **results}


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


class Listener:
    """A tap that counts the calls of its layer."""

    calls = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        scale: float | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        self.calls += 1
        return attention(query, key, value, attn_mask=attn_mask, scale=scale).output
