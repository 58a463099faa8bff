"""Divergences as sums over the keys, of maps that are known: D = sum phi(a, b).

Maps come as base-2 logarithms of probabilities, MASKED for hidden pairs, and never as
probabilities alone: where a map underflows, the logarithm of its ratio to the other does not. With
phi' = dphi/da (up to a constant, which the gradient does not see),
    dD/ds_j = a_j (phi'_j - c),  c = sum_k a_k phi'_k
and of maps averaged over heads, a_h the map of one of H of them and a their average,
    dD/ds_hj = 1/H a_hj (phi'_j - c_h),  c_h = sum_k a_hk phi'_k.

`slope` is phi' itself, but of forward_kl, whose phi' = -b/a is huge where a underflows, its base-2
logarithm without the sign; `weighted_slope` is a_h phi' of either.
"""

import triton
import triton.language as tl

from attn_kd.kernels.triton.tiles import LN2


@triton.jit
def log2_of_mean(log_a, log_b):
    """log2((a + b) / 2)."""
    return tl.maximum(log_a, log_b) + (tl.log2(1 + tl.exp2(-tl.abs(log_a - log_b))) - 1)


@triton.jit
def value(log_a, log_b, V: tl.constexpr):
    """phi(a, b)."""
    a, b = tl.exp2(log_a), tl.exp2(log_b)
    if V.divergence == "reverse_kl":
        phi = a * (log_a - log_b) * LN2
    elif V.divergence == "forward_kl":
        phi = b * (log_b - log_a) * LN2
    elif V.divergence == "js":
        log_m = log2_of_mean(log_a, log_b)
        phi = (a * (log_a - log_m) + b * (log_b - log_m)) * (0.5 * LN2)
    else:
        tl.static_assert(V.divergence == "mse")
        phi = (a - b) * (a - b)
    return phi


@triton.jit
def slope(log_a, log_b, V: tl.constexpr):
    """phi'(a, b), or of forward_kl log2(-phi')."""
    if V.divergence == "reverse_kl":
        result = (log_a - log_b) * LN2
    elif V.divergence == "forward_kl":
        result = log_b - log_a
    elif V.divergence == "js":
        result = (log_a - log2_of_mean(log_a, log_b)) * (0.5 * LN2)
    else:
        tl.static_assert(V.divergence == "mse")
        result = 2 * (tl.exp2(log_a) - tl.exp2(log_b))
    return result


@triton.jit
def weighted_slope(a, log_a, slopes, V: tl.constexpr):
    """a phi' of a head whose map is a, from the `slope` of the average of all."""
    if V.divergence == "forward_kl":
        return -tl.exp2(log_a + slopes)
    else:
        return a * slopes
