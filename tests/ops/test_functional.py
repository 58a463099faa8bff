"""Values and gradients of the public operators against the definition in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attn_kd
from tests.ops import explicit
from tests.ops.cases import (
    ACCUMULATION,
    DIVERGENCES,
    DTYPES,
    HEAD_DIMS,
    Cotangents,
    Sizes,
    assert_accurate,
    assert_as_accurate_as_eager,
    largest,
    name_of,
    norm,
    random_cotangents,
    random_inputs,
    run,
    run_backend,
    truth_of,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def check(backend, sizes, dtype=torch.float32, *, teacher_dtype=None, roundings=None, **options):
    inputs = random_inputs(sizes, dtype, teacher_dtype=teacher_dtype)
    cotangents = random_cotangents(sizes, dtype)
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=roundings, **options)


@every_dtype
@every_divergence
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(backend, head_dim, divergence, dtype):
    check(backend, Sizes(D=head_dim, Dv=head_dim, Dt=head_dim), dtype, divergence=divergence)


@every_divergence
@pytest.mark.parametrize(
    ("D", "Dv", "Dt"), [(32, 8, 64), (8, 64, 3), (1, 256, 17), (40, 1, 256), (256, 3, 1)]
)
def test_head_dims_that_differ(backend, D, Dv, Dt, divergence):
    check(backend, Sizes(D=D, Dv=Dv, Dt=Dt), divergence=divergence)


@every_divergence
@pytest.mark.parametrize(
    ("Lq", "Lk"), [(1, 1), (1, 50), (50, 1), (7, 3), (3, 200), (200, 3), (2, 2)]
)
def test_lengths_that_differ(backend, Lq, Lk, divergence):
    check(backend, Sizes(Lq=Lq, Lk=Lk), divergence=divergence)


@every_divergence
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(B=1, H=2, Lq=100, Lk=Lk, D=32, Dv=32, Dt=32), id=f"{Lk} keys")
        for Lk in (169, 1064)
    ],
)
def test_twice_the_error_of_eager_code_at_the_sizes_of_an_encoder(backend, sizes, divergence):
    check(backend, sizes, roundings=0, divergence=divergence)


@every_divergence
@every_dtype
@pytest.mark.parametrize("reached", ["output", "kl", "lse"])
def test_gradient_through_each_result_alone(backend, reached, dtype, divergence):
    sizes = Sizes()
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype).only(reached)
    actual = run_backend(backend, inputs, cotangents, divergence=divergence)
    assert_as_accurate_as_eager(actual, inputs, cotangents, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_teacher_of_another_dtype(backend, dtype, teacher_dtype, divergence):
    check(backend, Sizes(), dtype, teacher_dtype=teacher_dtype, divergence=divergence)


@every_divergence
@every_dtype
def test_given_teacher_lse(backend, dtype, divergence):
    sizes = Sizes(Lq=70, Lk=150)
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype)
    lse = explicit.teacher_lse(inputs.teacher_query.double(), inputs.teacher_key.double())
    options = {"teacher_lse": lse.to(ACCUMULATION[dtype]), "divergence": divergence}
    actual = run_backend(backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, **options)


@pytest.mark.parametrize("keys", [4200, 16384])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_given_teacher_lse_of_thousands_of_keys(cpu_backend, divergence, keys):
    """The sums over the keys then exceed their small difference, the divergence, by far."""
    sizes = Sizes(B=1, H=2, Lq=64, Lk=keys, D=32, Dt=32, Dv=32)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
    lse = explicit.teacher_lse(inputs.teacher_query.double(), inputs.teacher_key.double())
    options = {"teacher_lse": lse.float(), "divergence": divergence}
    actual = run_backend(cpu_backend, inputs, cotangents, **options)
    assert_as_accurate_as_eager(actual, inputs, cotangents, roundings=0, **options)


@every_divergence
def test_given_teacher_lse_may_be_narrower_than_the_inputs(backend, divergence):
    inputs, cotangents = (
        make(Sizes(), torch.float64) for make in (random_inputs, random_cotangents)
    )
    lse = explicit.teacher_lse(inputs.teacher_query, inputs.teacher_key).float()
    actual = run_backend(backend, inputs, cotangents, teacher_lse=lse, divergence=divergence)
    truth = truth_of(inputs, cotangents, divergence=divergence)
    for name, expected in truth.items():
        assert actual[name].dtype == torch.float64
        torch.testing.assert_close(actual[name], expected, rtol=1e-6, atol=1e-6)


@every_divergence
@pytest.mark.parametrize(("scale", "teacher_scale"), [(1.0, None), (None, 0.25), (0.0, -0.7)])
def test_scales(backend, scale, teacher_scale, divergence):
    check(backend, Sizes(), scale=scale, teacher_scale=teacher_scale, divergence=divergence)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_logits_of_a_thousand(backend, dtype, divergence):
    sizes = Sizes(Lq=70, Lk=150)
    inputs, cotangents = random_inputs(sizes, dtype, spread=300.0), random_cotangents(sizes, dtype)
    actual = run_backend(backend, inputs, cotangents, divergence=divergence)
    lse = largest(actual["lse"])
    assert lse > 1000
    # The student's probabilities come from saved maxima and sums, and are as good as eager code's.
    # The teacher's come from its LSE, one number a row, whose rounding is `lse` times that of a
    # probability; and in float64 it is eager code, the truth there, that has such roundings.
    rounded = dtype == torch.float64 or divergence != "reverse_kl"
    assert_as_accurate_as_eager(
        actual,
        inputs,
        cotangents,
        roundings=lse / 2 if rounded else None,
        divergence=divergence,
    )


@every_divergence
def test_one_key_leaves_nothing_to_diverge(backend, divergence):
    sizes = Sizes(Lk=1)
    inputs, cotangents = random_inputs(sizes), random_cotangents(sizes).only("kl")
    actual = run_backend(backend, inputs, cotangents, divergence=divergence)
    assert actual["kl"].abs().max() <= 4 * torch.finfo(torch.float32).eps
    assert actual["grad_query"].abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert torch.equal(actual["output"], inputs.value.expand_as(actual["output"]))


@every_divergence
@every_dtype
def test_identical_teacher_and_student(backend, dtype, divergence):
    sizes = Sizes(Lq=70, Lk=150, Dt=8)
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype).only("kl")
    inputs = inputs._replace(teacher_query=inputs.query, teacher_key=inputs.key)
    actual = run_backend(backend, inputs, cotangents, divergence=divergence)
    eps = torch.finfo(ACCUMULATION[dtype]).eps
    assert actual["kl"].abs().max() <= 16 * eps  # lse is about 5: its rounding, twice
    assert actual["grad_query"].abs().max() <= 64 * eps
    assert actual["grad_key"].abs().max() <= 64 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@every_divergence
class TestLowPrecisionInputs:
    """16-bit inputs cost the rounding of the results; dot products of bfloat16 a little more."""

    sizes = Sizes(Lq=40, Lk=120, D=32, Dt=32)

    def test_divergence_and_lse_are_as_good_as_in_float32(self, backend, dtype, divergence):
        inputs, cotangents = random_inputs(self.sizes, dtype), random_cotangents(self.sizes, dtype)
        actual = run_backend(backend, inputs, cotangents, divergence=divergence)
        wide = inputs.to(torch.float32)
        truth = truth_of(wide, cotangents, divergence=divergence)
        eager = run(explicit.attention_kl, wide, cotangents, divergence=divergence)
        assert_accurate({name: actual[name] for name in ("kl", "lse")}, eager, truth)

    @pytest.mark.usefixtures("exact_products")
    def test_output_is_rounded_once(self, backend, dtype, divergence):
        inputs, cotangents = random_inputs(self.sizes, dtype), random_cotangents(self.sizes, dtype)
        actual = run_backend(backend, inputs, cotangents, divergence=divergence)
        assert_rounded_once(actual, truth_of(inputs, cotangents), "output", dtype)

    @pytest.mark.usefixtures("exact_products")
    def test_gradient_of_the_divergence_is_rounded_once(self, backend, dtype, divergence):
        # Logits rounded to 16 bits would leave kl right to a percent and this wrong by more.
        inputs = random_inputs(self.sizes, dtype)
        cotangents = random_cotangents(self.sizes, dtype).only("kl", "lse")
        actual = run_backend(backend, inputs, cotangents, divergence=divergence)
        truth = truth_of(inputs, cotangents, divergence=divergence)
        for name in ("grad_query", "grad_key"):
            assert_rounded_once(actual, truth, name, dtype)

    def test_output_and_gradients_are_as_good_as_eagers(self, backend, dtype, divergence):
        inputs, cotangents = random_inputs(self.sizes, dtype), random_cotangents(self.sizes, dtype)
        actual = run_backend(backend, inputs, cotangents, divergence=divergence)
        assert_as_accurate_as_eager(actual, inputs, cotangents, divergence=divergence)

    def test_gradient_of_the_divergence_is_as_good_as_eagers(self, backend, dtype, divergence):
        inputs = random_inputs(self.sizes, dtype)
        cotangents = random_cotangents(self.sizes, dtype).only("kl", "lse")
        actual = run_backend(backend, inputs, cotangents, divergence=divergence)
        assert_as_accurate_as_eager(actual, inputs, cotangents, divergence=divergence)


def assert_rounded_once(actual, truth, name, dtype):
    expected = truth[name]
    half_a_unit = 0.5 * torch.finfo(dtype).eps * expected.abs()
    sums = 2e-6 * expected.abs().max() + 0.5 * torch.finfo(dtype).smallest_normal
    assert ((actual[name].double() - expected).abs() <= half_a_unit + sums).all(), name


@every_dtype
def test_attention_without_a_teacher(backend, dtype):
    sizes = Sizes(Lq=70, Lk=150)
    inputs = random_inputs(sizes, dtype)
    cotangents = random_cotangents(sizes, dtype).only("output", "lse")

    def attention(query, key, value, *_teacher):
        output, lse = attn_kd.attention(query, key, value, backend=backend)
        return output, lse.new_zeros(lse.shape), lse

    actual = run(attention, inputs, cotangents)
    del actual["kl"]
    truth = truth_of(inputs, cotangents)
    eager = run(explicit.attention_kl, inputs, cotangents)
    assert_accurate(actual, eager, truth)


@every_divergence
@every_dtype
def test_divergence_alone(backend, dtype, divergence):
    inputs = random_inputs(Sizes(Lq=70, Lk=150), dtype)
    query, key = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    alone = attn_kd.attention_kl_div(
        query, key, *inputs[3:], divergence=divergence, backend=backend
    )
    grads = torch.autograd.grad(alone.kl.sum() + alone.lse.sum(), (query, key))
    ones = torch.ones_like(alone.kl)
    both = run_backend(backend, inputs, Cotangents(None, ones, ones), divergence=divergence)
    for got, name in zip((*alone, *grads), ("kl", "lse", "grad_query", "grad_key"), strict=True):
        torch.testing.assert_close(got, both[name], msg=lambda text, name=name: f"{name}: {text}")


OPTIONS = {
    "attn_mask": torch.arange(29) % 3 > 0,
    "scale": 0.7,
    "teacher_scale": 0.7,
    "teacher_lse": torch.linspace(2, 3, 2 * 3 * 13).view(2, 3, 13),
    "row_weights": torch.arange(13.0),
    "head_reduction": "mean",
}


@pytest.mark.parametrize(("name", "option"), OPTIONS.items(), ids=OPTIONS)
def test_divergence_alone_takes_every_option(backend, name, option):
    query, key, value, *teacher = random_inputs(Sizes())
    both, plain = (
        attn_kd.attention_kl(query, key, value, *teacher, backend=backend, **options)
        for options in ({name: option}, {})
    )
    alone = attn_kd.attention_kl_div(query, key, *teacher, backend=backend, **{name: option})
    torch.testing.assert_close(tuple(alone), (both.kl, both.lse))
    assert both.kl.shape != plain.kl.shape or not torch.allclose(both.kl, plain.kl)


@pytest.mark.parametrize("name", ["attn_mask", "scale"])
def test_attention_takes_every_option(backend, name):
    inputs, option = random_inputs(Sizes()), {name: OPTIONS[name]}
    both = attn_kd.attention_kl(*inputs, backend=backend, **option)
    alone, plain = (
        attn_kd.attention(*inputs[:3], backend=backend, **options) for options in (option, {})
    )
    torch.testing.assert_close(tuple(alone), (both.output, both.lse))
    assert not torch.allclose(alone.output, plain.output)


@every_dtype
def test_dtypes_and_shapes_of_the_results(backend, dtype):
    inputs = random_inputs(Sizes(B=2, H=3, Lq=4, Lk=5, D=6, Dv=7), dtype)
    out = attn_kd.attention_kl(*inputs, backend=backend)
    assert (out.output.shape, out.output.dtype) == ((2, 3, 4, 7), dtype)
    assert (out.kl.shape, out.kl.dtype) == ((2, 3, 4), ACCUMULATION[dtype])
    assert (out.lse.shape, out.lse.dtype) == ((2, 3, 4), ACCUMULATION[dtype])


@every_divergence
def test_lse_of_attention_is_the_teacher_lse_of_attention_kl(backend, divergence):
    inputs, cotangents = random_inputs(Sizes()), random_cotangents(Sizes())
    no_value = inputs.teacher_key
    attention = partial(attn_kd.attention, backend=backend)
    lse = attention(inputs.teacher_query, inputs.teacher_key, no_value).lse
    given = run_backend(backend, inputs, cotangents, divergence=divergence, teacher_lse=lse)
    computed = run_backend(backend, inputs, cotangents, divergence=divergence)
    for name in computed:
        torch.testing.assert_close(given[name], computed[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_sum_over_keys_of_the_logit_gradient_is_the_lse_cotangent(backend, dtype):
    """Softmax is unchanged by a shift of the logits: with keys all ones, dq counts the shift."""
    sizes = Sizes(D=1, Dt=1)
    inputs = random_inputs(sizes, dtype)
    inputs = inputs._replace(key=torch.ones_like(inputs.key))
    cotangents = random_cotangents(sizes, dtype)
    actual = run_backend(backend, inputs, cotangents, scale=1.0)
    torch.testing.assert_close(actual["grad_query"][..., 0], cotangents.lse)


@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_single_rows_are_as_accurate_as_eager(cpu_backend, head_dim, spread):
    """In float32, summed over heads and seeds, for few numbers make a ratio of errors a matter of
    chance. Sharp logits show what is wrong with them in the gradient of value."""
    error, eager_error = {}, {}
    for seed in range(5):
        torch.manual_seed(seed)
        sizes = Sizes(B=1, H=32, Lq=1, Lk=1064, D=head_dim, Dv=head_dim, Dt=head_dim)
        inputs, cotangents = random_inputs(sizes), random_cotangents(sizes)
        inputs = inputs._replace(query=spread * inputs.query)
        truth = truth_of(inputs, cotangents)
        actual = run_backend(cpu_backend, inputs, cotangents)
        eager = run(explicit.attention_kl, inputs, cotangents)
        for name, exact in truth.items():
            error[name] = error.get(name, 0) + norm(actual[name].double() - exact)
            eager_error[name] = eager_error.get(name, 0) + norm(eager[name].double() - exact)
    assert not {name for name in error if error[name] > 2 * eager_error[name]}
