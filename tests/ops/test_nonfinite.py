"""NaN and infinity stay in the rows they belong to."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import (
    DIVERGENCES,
    Sizes,
    assert_equal,
    filled,
    name_of,
    random_cotangents,
    random_inputs,
    run_backend,
)

SIZES = Sizes(B=2, H=2, Lq=75, Lk=110, D=8, Dv=5, Dt=8)
BATCH, HEAD, ROW, KEY = 1, 0, 66, 98

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_poison = pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])


def poisoned(backend, name, at, poison, **options):
    """Results without and with `poison` at `at` in the tensor `name`."""
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    # An infinity in a key's column 2 makes logits of both signs: a probability of 1 or 0 at it.
    for query in (inputs.query, inputs.teacher_query):
        query[..., 2] = query[..., 2].abs() * torch.tensor([1.0, -1.0]).repeat(SIZES.Lq)[: SIZES.Lq]
    clean = run_backend(backend, inputs, cotangents, **options)
    tensor = getattr(inputs, name).clone()
    tensor[at] = poison
    dirty = run_backend(backend, inputs._replace(**{name: tensor}), cotangents, **options)
    return clean, dirty


def without(results, at, *names):
    """The named results with zeros at `at`."""
    return {
        name: results[name].index_put(at, torch.zeros((), dtype=results[name].dtype))
        for name in names
    }


def index(*at):
    return tuple(torch.tensor(i) for i in at)


@every_divergence
@every_poison
def test_in_a_query_row(backend, poison, divergence):
    at = (BATCH, HEAD, ROW)
    clean, dirty = poisoned(backend, "query", (*at, 2), poison, divergence=divergence)
    for name in ("output", "kl", "grad_query"):
        assert not dirty[name][at].isfinite().any(), name
    assert not dirty["lse"][at].isfinite()
    rows = ("output", "kl", "lse", "grad_query")
    assert_equal(without(dirty, index(*at), *rows), without(clean, index(*at), *rows))
    # every key of the head receives from that row, and no other head does
    keys = ("grad_key", "grad_value")
    head = index(BATCH, HEAD)
    assert_equal(without(dirty, head, *keys), without(clean, head, *keys))


@every_divergence
@every_poison
def test_in_a_teacher_query_row(backend, poison, divergence):
    at = (BATCH, HEAD, ROW)
    clean, dirty = poisoned(backend, "teacher_query", (*at, 2), poison, divergence=divergence)
    assert not dirty["kl"][at].isfinite()
    assert not dirty["grad_query"][at].isfinite().any()
    assert_equal(dirty, {name: clean[name] for name in ("output", "lse", "grad_value")})
    rows = ("kl", "grad_query")
    assert_equal(without(dirty, index(*at), *rows), without(clean, index(*at), *rows))


@every_divergence
@every_poison
@pytest.mark.parametrize("name", ["key", "teacher_key"])
def test_in_a_key(backend, name, poison, divergence):
    """It reaches the rows that see the key: here all but those of one block of the mask."""
    mask = torch.ones(SIZES.Lq, SIZES.Lk, dtype=torch.bool)
    mask[:70, KEY] = False
    at = (BATCH, HEAD, KEY, 2)
    clean, dirty = poisoned(backend, name, at, poison, divergence=divergence, attn_mask=mask)
    kl = dirty["kl"][BATCH, HEAD]
    # an infinite key can leave a row with a vanishing probability of it, never a wrong finite value
    reached = kl[70:].isfinite().logical_not()
    assert reached.all() if poison != poison else reached.any()
    results = ("output", "kl", "lse")
    seeing = tuple(
        i.flatten()
        for i in torch.meshgrid(
            torch.tensor(BATCH), torch.tensor(HEAD), torch.arange(70, SIZES.Lq), indexing="ij"
        )
    )
    assert_equal(without(dirty, seeing, *results), without(clean, seeing, *results))
    head = index(BATCH, HEAD)
    grads = ("grad_query", "grad_key", "grad_value")
    assert_equal(without(dirty, head, *grads), without(clean, head, *grads))


@every_divergence
@every_poison
def test_in_a_value(backend, poison, divergence):
    at = (BATCH, HEAD, KEY, 3)
    clean, dirty = poisoned(backend, "value", at, poison, divergence=divergence)
    column = dirty["output"][BATCH, HEAD, :, 3]
    assert not column.isfinite().any()
    assert_equal(dirty, {name: clean[name] for name in ("kl", "lse")})
    keep = torch.ones_like(clean["output"], dtype=torch.bool)
    keep[BATCH, HEAD, :, 3] = False
    assert torch.equal(dirty["output"][keep], clean["output"][keep])


HIDING = {
    "bool": None,
    "additive -inf": -torch.inf,
    "additive lowest": torch.finfo(torch.float32).min,
}


@every_divergence
@every_poison
@pytest.mark.parametrize("bias", HIDING.values(), ids=HIDING.keys())
def test_in_padding_changes_nothing(backend, bias, poison, divergence):
    """What fills the keys, values and teacher's keys that a key padding mask hides is not seen."""
    visible = torch.ones(SIZES.B, 1, 1, SIZES.Lk, dtype=torch.bool)
    visible[0, ..., 90:] = False  # the end of a tile of 96 keys, and a whole one
    visible[1, ..., KEY] = False
    mask = visible if bias is None else torch.where(visible, 0.5, bias)
    check_padding(backend, SIZES, mask, ~visible, poison, divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_in_padding_of_other_dtypes_changes_nothing(backend, dtype):
    hidden = torch.arange(SIZES.Lk)[None, None, None] >= 40
    check_padding(backend, SIZES, ~hidden, hidden, torch.nan, dtype)


@pytest.mark.parametrize("Lq", [1, 70], ids=lambda n: f"{n} queries")
@pytest.mark.parametrize("heads", [1, SIZES.H], ids=["all heads", "each head"])
def test_in_padding_of_masks_of_other_shapes_changes_nothing(backend, heads, Lq):
    sizes = SIZES._replace(Lq=Lq)
    hidden = torch.rand(SIZES.B, heads, 1, SIZES.Lk) > 0.8
    mask = (~hidden).expand(-1, -1, Lq, -1)
    check_padding(backend, sizes, mask, hidden, torch.nan)


def test_in_padding_of_a_sequence_without_keys_changes_nothing(backend):
    hidden = torch.zeros(SIZES.B, 1, 1, SIZES.Lk, dtype=torch.bool)
    hidden[0] = True
    results = check_padding(backend, SIZES, ~hidden, hidden, torch.inf)
    assert (results["lse"][0] == -torch.inf).all()


def check_padding(backend, sizes, mask, hidden, poison, dtype=torch.float32, **options):
    """Results with `poison` in the hidden keys are bit for bit those with zeros there."""
    inputs, cotangents = random_inputs(sizes, dtype), random_cotangents(sizes, dtype)
    clean, dirty = (
        run_backend(backend, filled(inputs, hidden, value), cotangents, attn_mask=mask, **options)
        for value in (0, poison)
    )
    assert_equal(dirty, clean)
    for name in ("output", "kl", "grad_query", "grad_key", "grad_value"):
        assert dirty[name].isfinite().all(), name
    for name in ("grad_key", "grad_value"):
        assert (dirty[name].masked_select(hidden.transpose(-1, -2)) == 0).all(), name
    return dirty


@every_divergence
def test_in_the_mask(backend, divergence):
    inputs, cotangents = random_inputs(SIZES), random_cotangents(SIZES)
    mask = torch.randn(SIZES.Lq, SIZES.Lk)
    clean = run_backend(backend, inputs, cotangents, attn_mask=mask, divergence=divergence)
    mask[ROW, KEY] = torch.nan
    dirty = run_backend(backend, inputs, cotangents, attn_mask=mask, divergence=divergence)
    for name in ("output", "kl", "lse", "grad_query"):
        assert dirty[name][:, :, ROW].isnan().all(), name
        clean[name][:, :, ROW] = dirty[name][:, :, ROW] = 0
    assert_equal(dirty, {name: clean[name] for name in ("output", "kl", "lse", "grad_query")})
