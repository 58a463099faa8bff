"""The kernels of every instruction set, at the sizes where their tiles begin and end.

Sizes refer to csrc/cpu: panels of 64 queries in float32 and 32 in float64, up to 4 of them a task;
tiles of 96 keys forward, 48 backward and in second passes; chunks of 704 KiB of keys backward, of
512 keys where there is a second pass, of fewer for several heads together; micro-kernels of 3, 4, 6
or 8 rows and 1 to 4 vectors of 4 to 16 lanes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import (
    DIVERGENCES,
    DTYPES,
    HEAD_REDUCTIONS,
    Sizes,
    assert_as_accurate_as_eager,
    assert_equal,
    filled,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

pytestmark = pytest.mark.usefixtures("instruction_set")

# bfloat16 stands for the dot products of the instruction set that has them.
every_arithmetic = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of
)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_reduction = pytest.mark.parametrize("head_reduction", HEAD_REDUCTIONS)

QUERIES = (1, 31, 32, 33, 63, 64, 65, 127, 129)
KEYS = (1, 47, 48, 49, 95, 96, 97, 145, 193)


def check(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    *,
    roundings: float | None = None,
    **options,
) -> None:
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype, options.get("head_reduction", "none"))
    actual = run_backend("cpu", inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=roundings, **options)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("head_dim", [1, 3, 8, 17, 32, 40, 64, 80, 128, 256])
def test_head_dims(head_dim, divergence, dtype):
    sizes = Sizes(B=1, H=2, Lq=37, Lk=53, D=head_dim, Dv=head_dim, Dt=head_dim)
    check(sizes, dtype, divergence=divergence)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("count", QUERIES)
def test_queries_around_the_panels(count, divergence, dtype):
    check(Sizes(B=1, H=2, Lq=count, Lk=50), dtype, divergence=divergence)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("count", KEYS)
def test_keys_around_the_tiles(count, divergence, dtype):
    check(Sizes(B=1, H=2, Lq=35, Lk=count), dtype, divergence=divergence)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize("count", [281, 282, 511, 512, 513, 563, 564, 1127])
def test_keys_around_the_chunks(count, divergence, dtype):
    # sums this long leave nothing to chance: twice eager's error, and not a rounding more
    roundings = 0 if dtype == torch.float32 else None
    # in one pass 320 numbers a key: 563 keys of float32, 281 of float64
    sizes = Sizes(B=1, H=1, Lq=66, Lk=count, D=64, Dv=64, Dt=64)
    check(sizes, dtype, roundings=roundings, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_number_of_rows_left_over(rows, dtype, divergence):
    """Of micro-kernels (keys, and the columns of values and keys) and of vectors of lanes."""
    # Of so few bfloat16 numbers eager's error is chance: half a unit of bfloat16 more.
    roundings = 2.0**15 if dtype == torch.bfloat16 else None
    sizes = Sizes(B=1, H=1, Lq=rows, Lk=rows, D=rows, Dv=rows, Dt=rows)
    check(sizes, dtype, roundings=roundings, divergence=divergence)


@every_arithmetic
@every_divergence
@pytest.mark.parametrize(
    "Lq", [4 * 64, 4 * 64 + 1, 5 * 64 - 3, 9 * 64], ids=lambda n: f"{n} queries"
)
def test_several_panels_a_task(Lq, divergence, dtype):
    # 8 heads with one thread: enough tasks that each takes four panels, the last what is left
    mask = torch.rand(2, 1, Lq, 100) > 0.2
    check(Sizes(B=2, H=4, Lq=Lq, Lk=100), dtype, attn_mask=mask, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("given", [False, True], ids=["computes teacher_lse", "given teacher_lse"])
def test_maximum_that_rises_with_every_tile(divergence, given):
    """Every tile makes the sums of all earlier ones shrink, for the student or the teacher."""
    sizes = Sizes(B=1, H=2, Lq=70, Lk=500, D=4, Dv=3, Dt=4)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    rising = torch.linspace(-3, 3, sizes.Lk)[:, None]
    for student, teacher in ((rising, rising), (rising, rising.flip(0)), (-rising, rising)):
        steep = inputs._replace(
            query=inputs.query.abs(),
            teacher_query=inputs.teacher_query.abs(),
            key=inputs.key + student,
            teacher_key=inputs.teacher_key + teacher,
        )
        options = {"divergence": divergence}
        if given:
            logits = sizes.Dt**-0.5 * steep.teacher_query.double() @ steep.teacher_key.double().mT
            options["teacher_lse"] = logits.logsumexp(-1).float()
        actual = run_backend("cpu", steep, cotangents, **options)
        # the saved LSEs are of the order of 10, and so are the roundings of their probabilities
        assert_as_accurate_as_eager(actual, steep, cotangents, roundings=16, **options)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("Lq", [1, 33, 65, 129], ids=lambda n: f"{n} queries")
@pytest.mark.parametrize("Lk", [1, 47, 49, 97], ids=lambda n: f"{n} keys")
def test_averaged_maps_around_the_tiles(Lk, Lq, dtype, divergence):
    sizes = Sizes(B=2, H=3, Lq=Lq, Lk=Lk, Ht=2)
    check(sizes, dtype, divergence=divergence, head_reduction="mean")


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_averaged_maps_of_every_dtype(dtype, divergence):
    check(Sizes(Ht=5, Lk=60), dtype, divergence=divergence, head_reduction="mean")


@every_arithmetic
@pytest.mark.parametrize("count", [239, 240, 241, 500])
def test_averaged_maps_around_the_chunks(count, dtype):
    # 16 heads, 32 + 32 columns of gradients: 1 MiB is 256 keys, 240 in whole tiles
    check(Sizes(B=1, H=16, Lq=70, Lk=count, D=32, Dv=32, Dt=4), dtype, head_reduction="mean")


@every_divergence
@every_reduction
@pytest.mark.parametrize("G", [2, 3, 16])
@pytest.mark.parametrize("Lk", [1, 50, 97, 130], ids=lambda n: f"{n} keys")
def test_grouped_teacher_keys_around_the_tiles(Lk, G, head_reduction, divergence):
    sizes = Sizes(B=1, H=2, Lq=35, Lk=Lk, G=G)
    check(sizes, divergence=divergence, head_reduction=head_reduction)


def band(Lq: int, Lk: int, width: int) -> Tensor:
    """Row i sees `width` keys from i on: whole tiles are hidden for some rows or for all."""
    offset = torch.arange(Lk)[None, :] - torch.arange(Lq)[:, None]
    return (offset >= 0) & (offset < width)


def keys_from_to(Lk: int, begin: int, end: int) -> Tensor:
    """Key padding [1, 1, 1, Lk] that leaves keys begin to end."""
    at = torch.arange(Lk)
    return ((at >= begin) & (at < end))[None, None, None]


MASKS = {
    "band": band(130, 400, 30),
    "late keys alone": keys_from_to(400, 350, 400),
    "early keys alone": keys_from_to(400, 0, 20),
    "one tile in the middle": keys_from_to(400, 100, 190),
    "one key": keys_from_to(400, 230, 231),
    "causal": torch.ones(130, 400, dtype=torch.bool).tril(),
    "late causal": torch.ones(130, 400, dtype=torch.bool).triu(250),
    "half the rows": (torch.arange(130) % 2 == 0)[:, None],
    "one panel": ((torch.arange(130) >= 64) & (torch.arange(130) < 128))[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_hidden_tiles_of_averaged_maps(mask, dtype):
    """Of all heads, and of the first and the last head alone."""
    sizes = Sizes(B=1, H=3, Lq=130, Lk=400, D=8, Dv=6, Dt=8)
    check(sizes, dtype, attn_mask=mask, head_reduction="mean")
    for head in (0, 2):
        of_one = torch.ones(1, 3, 130, 400, dtype=torch.bool)
        of_one[0, head] = mask
        check(sizes, dtype, attn_mask=of_one, head_reduction="mean")


@every_divergence
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_hidden_tiles(mask, kind, divergence):
    if kind == "additive":
        mask = torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
    sizes = Sizes(B=1, H=1, Lq=130, Lk=400, D=8, Dv=6, Dt=8)
    check(sizes, attn_mask=mask, divergence=divergence)


@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("Lq", [1, 37, 4 * 64 + 1], ids=lambda n: f"{n} queries")
def test_garbage_in_hidden_keys_changes_nothing(Lq, dtype, head_reduction):
    """In every panel of a task, in tiles that are hidden in part and as a whole."""
    sizes = Sizes(B=1, H=8, Lq=Lq, Lk=230)
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype, head_reduction)
    mask = keys_from_to(sizes.Lk, 3, 90)
    options = {"attn_mask": mask, "head_reduction": head_reduction}
    clean, dirty = (
        run_backend("cpu", filled(inputs, ~mask, value), cotangents, **options)
        for value in (0, torch.nan)
    )
    assert_equal(dirty, clean)


def test_padding_lanes_hold_nothing_of_the_previous_panel():
    """A short last panel of infinite predecessors, and rows alone, give the same bits."""
    sizes = Sizes(B=1, H=1, Lq=67, Lk=60)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    first = run_backend("cpu", inputs, cotangents)
    query = inputs.query.clone()
    query[:, :, :64] = torch.inf
    second = run_backend("cpu", inputs._replace(query=query), cotangents)
    for name in ("output", "kl", "lse", "grad_query"):
        assert torch.equal(first[name][:, :, 64:], second[name][:, :, 64:]), name


def rows_and_keys(Lq: int, Lk: int) -> dict[str, Tensor | None]:
    """A mask of each kind that the kernels know, one of whose rows sees no key if it has rows."""
    pairs = torch.rand(Lq, Lk, generator=torch.Generator().manual_seed(0)) > 0.3
    pairs[5] = False
    return {"no mask": None, "mask of pairs": pairs, "mask of keys": pairs[None, None, :1]}


FEW_MASKS = rows_and_keys(37, 61)


@pytest.mark.usefixtures("filled_results")
@every_reduction
@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("mask", FEW_MASKS.values(), ids=FEW_MASKS.keys())
def test_results_are_written_and_scratch_is_not_read_before(
    mask, dropout_p, dtype, divergence, head_reduction
):
    """Every element of every result, of odd sizes; `poisoned_scratch` is on as in every test."""
    sizes = Sizes(B=1, H=2, Lq=37, Lk=61, D=7, Dv=5, Dt=9)
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype, head_reduction)
    results = run_backend(
        "cpu",
        inputs,
        cotangents,
        attn_mask=mask,
        dropout_p=dropout_p,
        divergence=divergence,
        head_reduction=head_reduction,
    )
    lse = results.pop("lse")
    if mask is not None and mask.shape[-2] > 1:
        assert (lse[:, :, 5] == -torch.inf).all()
        lse[:, :, 5] = 0.0
    for name, result in {**results, "lse": lse}.items():
        assert result.isfinite().all(), name


@every_arithmetic
def test_gradients_of_rows_that_see_no_key_go_nowhere(dtype):
    """Not even NaN."""
    sizes = Sizes(B=1, H=2, Lq=37, Lk=61)
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype)
    mask = torch.rand(sizes.Lq, sizes.Lk) > 0.3
    mask[[3, 36]] = False
    expected = run_backend("cpu", inputs, cotangents, attn_mask=mask)
    output = cotangents.output.clone()
    output[:, :, [3, 36]] = torch.nan
    actual = run_backend("cpu", inputs, cotangents._replace(output=output), attn_mask=mask)
    assert_equal(actual, expected)
