"""Forward passes of so few rows that their keys are split, into ranges of 256 keys or more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc.test_kernels import check, every_arithmetic
from tests.ops import cases, explicit
from tests.ops.cases import Results, Sizes, random_cotangents, random_inputs, run_backend

# What the ranges have gathered lies in memory of torch's, which is full of NaN beforehand.
pytestmark = pytest.mark.usefixtures("instruction_set", "filled_results")

# The other divergences, and averages, split the attention that comes before their second pass.
ONE_PASS = ("reverse_kl", "forward_kl")
TWO_PASSES = (("js", "none"), ("mse", "none"), ("reverse_kl", "mean"))
Lk = 1100  # four ranges of 275
FEW = Sizes(B=1, H=2, Lq=3, Lk=Lk)

every_divergence = pytest.mark.parametrize("divergence", ONE_PASS)
every_second_pass = pytest.mark.parametrize(("divergence", "head_reduction"), TWO_PASSES)
computed_or_given = pytest.mark.parametrize(
    "given", [False, True], ids=["computes teacher_lse", "given teacher_lse"]
)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("Lq", [1, 2, 3, 4, 5, 66], ids=lambda n: f"{n} queries")
def test_queries(Lq, divergence, dtype):
    check(FEW._replace(Lq=Lq), dtype, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("width", [1, 16, 23, 32, 40, 64])
def test_widths_of_few_rows(width, divergence):
    check(FEW._replace(Lk=520, D=width, Dv=width, Dt=width + 3), divergence=divergence)


@every_divergence
@pytest.mark.parametrize("G", [2, 3])
def test_grouped_teacher_keys(G, divergence):
    check(FEW._replace(G=G, Lk=600), divergence=divergence)


def seen(*ranges: tuple[int, int]) -> Tensor:
    """Masks [1, 1, rows, Lk], one row for each range of keys that it sees."""
    at = torch.arange(Lk)
    return torch.stack([(at >= begin) & (at < end) for begin, end in ranges])[None, None]


MASKS = {
    "one range for all": seen((300, 400)),
    "the last key": seen((Lk - 1, Lk)),
    "no key": seen((0, 0)),
    "another range for each": seen((0, 100), (300, 400), (1000, Lk)),
    "one row sees none": seen((0, Lk), (0, 0), (500, 900)),
    "additive": torch.zeros(1, 1, 3, Lk).masked_fill(seen((0, 600), (600, Lk), (0, 1)), -1e9),
}


every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def check_masked(mask: Tensor, given: bool, dtype: torch.dtype, **options: Any) -> None:
    """Of FEW; a given teacher_lse is computed in float64, -inf in rows that see no key."""
    head_reduction = options.get("head_reduction", "none")
    inputs, cotangents = random_inputs(FEW, dtype), random_cotangents(FEW, dtype, head_reduction)
    options["attn_mask"] = mask
    if given:
        teacher, in_double = inputs.to(torch.float64)[3:], cases.in_double({"attn_mask": mask})
        lse = explicit.teacher_lse(*teacher, **in_double)
        options["teacher_lse"] = lse.to(cases.ACCUMULATION[dtype])
    actual = run_backend("cpu", inputs, cotangents, **options)
    cases.assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@every_arithmetic
@every_divergence
@computed_or_given
@every_mask
def test_hidden_ranges(mask, given, divergence, dtype):
    check_masked(mask, given, dtype, divergence=divergence)


@every_second_pass
@computed_or_given
@every_mask
def test_hidden_ranges_before_a_second_pass(mask, given, divergence, head_reduction):
    options = {"divergence": divergence, "head_reduction": head_reduction}
    check_masked(mask, given, torch.float32, **options)


@every_arithmetic
@every_second_pass
@pytest.mark.parametrize("Lq", [1, 66], ids=lambda n: f"{n} queries")
def test_queries_before_a_second_pass(Lq, divergence, head_reduction, dtype):
    sizes = FEW._replace(Lq=Lq, Lk=520)
    check(sizes, dtype, divergence=divergence, head_reduction=head_reduction)


@pytest.mark.parametrize("divergence", ["reverse_kl", "mse"])
@pytest.mark.parametrize("Lq", [1, 66], ids=lambda n: f"{n} queries")
def test_teacher_of_other_heads(Lq, divergence):
    """Whose log-sum-exp is a split pass of its own."""
    sizes = FEW._replace(Lq=Lq, Lk=520, Ht=5)
    check(sizes, divergence=divergence, head_reduction="mean")


@pytest.mark.parametrize("divergence", [*ONE_PASS, "js"])
@pytest.mark.parametrize("Lq", [1, 3, 66], ids=lambda n: f"{n} queries")
def test_dropout(Lq, divergence):
    """Keeps what the reference backend keeps: where a range begins is not seen."""
    sizes = FEW._replace(Lq=Lq)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)

    def results(backend: str) -> Results:
        torch.manual_seed(7)
        options = {"divergence": divergence, "dropout_p": 0.3}
        return run_backend(backend, inputs, cotangents, **options)

    actual, expected = results("cpu"), results("reference")
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
