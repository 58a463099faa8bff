"""The divergences that one pass over the keys can compute, chosen at compile time.

csrc/cpu/kernels/divergence.h derives what is here. Everything is in base 2: u = s - t is the
difference of a pair's logits, the student's measured from its row's highest, the teacher's from its
row's LSE (or highest logit, while that is not known); p and b are probabilities, of the student and
the teacher, p before normalisation in the forward pass and after it in the backward pass.
"""

import triton
import triton.language as tl

from attn_kd.kernels.triton.tiles import LN2, LOG2E


@triton.jit
def term(p, b, u, V: tl.constexpr):
    """What a pair adds to its row's sum."""
    if V.divergence == "reverse_kl":
        added = p * u
    else:
        tl.static_assert(V.divergence == "forward_kl")
        added = -(b * u)
    return added


@triton.jit
def moved_sum(sum, student_sum, teacher_sum, shift, V: tl.constexpr):
    """The sum of terms once every u has grown by `shift`."""
    moved = sum + shift * student_sum if V.divergence == "reverse_kl" else sum - shift * teacher_sum
    return moved


@triton.jit
def row_divergence(sum, student_sum, teacher_sum, log_sum, teacher_log_sum, V: tl.constexpr):
    """D / ln 2 of a row from its sums and their logarithms."""
    if V.divergence == "reverse_kl":
        divergence = sum / student_sum - log_sum + teacher_log_sum
    else:
        divergence = sum / teacher_sum + log_sum - teacher_log_sum
    return divergence


@triton.jit
def row_correction(sum, student_sum, shift, V: tl.constexpr):
    """What the gradient measures u from, in natural units: sum a u of reverse_kl, else 0."""
    correction = LN2 * (sum / student_sum + shift) if V.divergence == "reverse_kl" else sum * 0.0
    return correction


@triton.jit
def teacher_origin(teacher_lse, correction, V: tl.constexpr):
    """What the backward pass measures the teacher's logits from.

    So that sum a u vanishes, and with it the offset: both are common to all keys of a row, and so
    would be their roundings, which the products with the keys would then add up.
    """
    origin = teacher_lse - correction * LOG2E if V.divergence == "reverse_kl" else teacher_lse
    return origin


@triton.jit
def row_offset(grad, correction, moved, V: tl.constexpr):
    """What a row's dS / p has beside the terms of `grad_logit`; `moved` is by how much the origin,
    once rounded, lies above the LSE."""
    offset = -grad * (correction + LN2 * moved) if V.divergence == "reverse_kl" else grad
    return offset


@triton.jit
def row_slope(grad, moved, V: tl.constexpr):
    """The factor of what depends on the pair in `grad_logit`."""
    slope = grad * LN2 if V.divergence == "reverse_kl" else grad * (1.0 + LN2 * moved)
    return slope


@triton.jit
def grad_logit(a, t, u, grad_probability, slope, V: tl.constexpr):
    """dS of a pair with probability a, whose other gradients sum up to grad_probability."""
    if V.divergence == "reverse_kl":
        grad = a * (grad_probability + slope * u)
    else:
        tl.static_assert(V.divergence == "forward_kl")
        grad = a * grad_probability - slope * tl.exp2(t)
    return grad
