"""Bad input: one error that names the value and says what was expected."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_kd
from attn_kd import InputError
from attn_kd.ops import checks
from tests.ops.cases import Sizes, random_inputs

B, H, Lq, Lk, D, Dv, Dt, *_ = SIZES = Sizes(B=2, H=3, Lq=4, Lk=5, D=6, Dv=7, Dt=8)


def call(**changes: Any) -> attn_kd.AttentionKLOutput:
    """attention_kl of good arguments but for `changes`."""
    return attn_kd.attention_kl(**{**random_inputs(SIZES)._asdict(), **changes})


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


TENSORS = ("query", "key", "value", "teacher_query", "teacher_key")

BAD_TENSORS = {
    "key: heads": ("key", zeros(B, 2, Lk, D), r"key .*\(2, 2\).*\(2, 3\)"),
    "key: batch": ("key", zeros(1, H, Lk, D), r"key .*\(1, 3\).*\(2, 3\)"),
    "key: head_dim": ("key", zeros(B, H, Lk, 9), "key has head_dim 9, expected 6"),
    "key: dtype": ("key", zeros(B, H, Lk, D, dtype=torch.half), "key is torch.float16"),
    "key: device": ("key", zeros(B, H, Lk, D, device="meta"), "key is on meta.*query is on cpu"),
    "value: tokens": ("value", zeros(B, H, 9, Dv), "value has 9 keys.*expected 5"),
    "value: heads": ("value", zeros(B, 1, Lk, Dv), r"value .*\(2, 1\)"),
    "value: dtype": ("value", zeros(B, H, Lk, Dv, dtype=torch.double), "value is torch.float64"),
    "teacher_query: batch": ("teacher_query", zeros(1, H, Lq, Dt), "teacher_query has batch 1"),
    "teacher_query: heads": ("teacher_query", zeros(B, 9, Lq, Dt), "teacher_query has 9 heads"),
    "teacher_query: grid": ("teacher_query", zeros(B, H, 9, Dt), "teacher_query has 9 tokens"),
    "teacher_query: head_dim": ("teacher_query", zeros(B, H, Lq, 9), "head_dim 8, expected 9"),
    "teacher_key: heads": ("teacher_key", zeros(B, 1, Lk, Dt), "teacher_key has 1 heads"),
    "teacher_key: grid": ("teacher_key", zeros(B, H, 9, Dt), "teacher_key has 9 tokens.*multiple"),
    "teacher_key: device": (
        "teacher_key",
        zeros(B, H, Lk, Dt, device="meta"),
        "teacher_key is on meta",
    ),
    "teacher_lse: shape": ("teacher_lse", zeros(B, H, Lk), r"teacher_lse has shape \(2, 3, 5\)"),
    "teacher_lse: rank": ("teacher_lse", zeros(B, H, Lq, 1), "teacher_lse has shape"),
    "teacher_lse: dtype": (
        "teacher_lse",
        zeros(B, H, Lq, dtype=torch.bfloat16),
        "teacher_lse is torch.bfloat16, expected torch.float32",
    ),
    "teacher_lse: device": (
        "teacher_lse",
        zeros(B, H, Lq, device="meta"),
        "teacher_lse is on meta",
    ),
    "attn_mask: keys": ("attn_mask", zeros(Lq, 9), r"attn_mask has shape \(4, 9\).*\(2, 3, 4, 5\)"),
    "attn_mask: queries": ("attn_mask", zeros(9, Lk), r"attn_mask has shape \(9, 5\)"),
    "attn_mask: key padding without axes": ("attn_mask", zeros(B, Lk), r"shape \(2, 5\)"),
    "attn_mask: rank": ("attn_mask", zeros(1, B, H, Lq, Lk), "attn_mask has shape"),
    "attn_mask: empty": ("attn_mask", zeros(Lq, 0), r"attn_mask has shape \(4, 0\)"),
    "attn_mask: dtype": (
        "attn_mask",
        zeros(Lq, Lk, dtype=torch.int64),
        "attn_mask is torch.int64, expected torch.bool or a floating dtype",
    ),
    "attn_mask: device": ("attn_mask", zeros(Lq, Lk, device="meta"), "attn_mask is on meta"),
    "attn_mask: gradient": (
        "attn_mask",
        zeros(Lq, Lk, requires_grad=True),
        "attn_mask requires grad",
    ),
}


@pytest.mark.parametrize(
    ("name", "tensor", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys()
)
def test_tensors_that_do_not_fit(name, tensor, message):
    with pytest.raises(InputError, match=message):
        call(**{name: tensor})


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("shape", [(), (3,), (4, 6), (3, 4, 6), (1, 2, 3, 4, 6)], ids=str)
def test_ranks(name, shape):
    with pytest.raises(InputError, match=f"{name} has shape .*expected 4 dimensions"):
        call(**{name: torch.zeros(shape)})


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes(name, dtype):
    shape = getattr(random_inputs(SIZES), name).shape
    with pytest.raises(InputError, match=f"{name} is {dtype}"):
        call(**{name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("dim", range(4), ids=["batch", "heads", "length", "width"])
@pytest.mark.parametrize("name", ["query", "key", "value", "teacher_query", "teacher_key"])
def test_empty_dimensions(name, dim):
    sizes = list(getattr(random_inputs(SIZES), name).shape)
    sizes[dim] = 0
    with pytest.raises(InputError, match=f"^{name} has shape .*expected no empty dimension"):
        call(**{name: torch.zeros(sizes)})


@pytest.mark.parametrize("empty", ["B", "H", "Lq", "Lk", "D"])
def test_empty_everywhere(empty):
    """All tensors agree that there is nothing: an empty batch, no keys, ..."""
    with pytest.raises(InputError, match=r"^(query|key) has shape .*expected no empty dimension"):
        attn_kd.attention_kl(*random_inputs(SIZES._replace(**{empty: 0})))


def test_an_unknown_backend():
    with pytest.raises(InputError, match=r"backend='cudnn' is unknown; expected .*reference"):
        call(backend="cudnn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown; expected one of .*reverse_kl"),
        ({"divergence": None}, "divergence=None is unknown"),
        ({"divergence": 3}, "divergence=3 is unknown"),
        ({"head_reduction": "sum"}, "head_reduction='sum' is unknown"),
        ({"head_reduction": None}, "head_reduction=None is unknown"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"scale": 1e300}, r"scale=1e\+300"),
        ({"teacher_scale": float("nan")}, "teacher_scale=nan"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"dropout_p": float("nan")}, "dropout_p=nan"),
        ({"dropout_p": None}, "dropout_p=None"),
        ({"attn_mask": zeros(Lq, Lk, dtype=torch.int32)}, "attn_mask is torch.int32"),
        ({"attn_mask": zeros(Lq, Lk).to(torch.float8_e4m3fn)}, "attn_mask is torch.float8_e4m3fn"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_options(backend, options, message):
    with pytest.raises(InputError, match=message):
        call(**options, backend=backend)


MEAN = {"head_reduction": "mean"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_query": zeros(B, 2, Lq, Dt)}, "teacher_key has 3 heads, expected 2"),
        ({"teacher_key": zeros(B, 2, Lk, Dt)}, "teacher_key has 2 heads, expected 3"),
        ({"teacher_lse": zeros(B, Lq)}, r"teacher_lse has shape .*expected \(2, 3, 4\)"),
        (
            {
                "teacher_query": zeros(B, 2, Lq, Dt),
                "teacher_key": zeros(B, 2, Lk, Dt),
                "attn_mask": zeros(H, 1, Lk),
            },
            "attn_mask has shape .*3 heads, but the teacher has 2",
        ),
    ],
    ids=["teacher_query", "teacher_key", "teacher_lse", "mask per head"],
)
def test_heads_that_do_not_fit_in_an_average(change, message):
    with pytest.raises(InputError, match=message):
        call(**MEAN, **change)


@pytest.mark.parametrize(
    ("row_weights", "options", "message"),
    [
        (zeros(B, Lq), {}, r"row_weights has shape \(2, 4\).*\(2, 3, 4\)"),
        (zeros(B, H, Lq), MEAN, r"row_weights has shape \(2, 3, 4\).*\(2, 4\)"),
        (zeros(Lq, dtype=torch.int64), {}, "row_weights is torch.int64"),
        (zeros(Lq, device="meta"), {}, "row_weights is on meta"),
        (0.5, {}, "row_weights is float"),
    ],
    ids=["shape", "shape of an average", "dtype", "device", "number"],
)
def test_row_weights(row_weights, options, message):
    with pytest.raises(InputError, match=message):
        call(row_weights=row_weights, **options)


@pytest.mark.parametrize("name", [*TENSORS, "teacher_lse", "attn_mask"])
def test_what_is_no_tensor(name):
    with pytest.raises(InputError, match=f"{name} is list, expected a torch.Tensor"):
        call(**{name: [1.0, 2.0]})


def test_no_teacher():
    with pytest.raises(InputError, match="teacher_query is None"):
        call(teacher_query=None, teacher_key=None)
    with pytest.raises(InputError, match="teacher_key is NoneType"):
        call(teacher_key=None)


def test_errors_of_attention():
    query, key, value, *_ = random_inputs(SIZES)
    with pytest.raises(InputError, match="value has 9 keys"):
        attn_kd.attention(query, key, torch.zeros(B, H, 9, Dv))
    with pytest.raises(InputError, match="attn_mask has shape"):
        attn_kd.attention(query, key, value, attn_mask=torch.zeros(9, 9))
    with pytest.raises(InputError, match=r"dropout_p=1\.5"):
        attn_kd.attention(query, key, value, dropout_p=1.5)
    with pytest.raises(InputError, match="value has shape"):
        attn_kd.attention(query, key, torch.zeros(B, H, Lk, 0))


def test_errors_of_the_divergence_alone():
    query, key, _, teacher_query, teacher_key = random_inputs(SIZES)
    with pytest.raises(InputError, match="teacher_key has 9 tokens"):
        attn_kd.attention_kl_div(query, key, teacher_query, torch.zeros(B, H, 9, Dt))
    with pytest.raises(InputError, match="divergence='l1' is unknown"):
        attn_kd.attention_kl_div(query, key, teacher_query, teacher_key, divergence="l1")


def test_input_error_is_a_value_error_of_one_line():
    with pytest.raises(ValueError) as caught:
        call(key=torch.zeros(1))
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


class TestTeacherThatRequiresGrad:
    @pytest.fixture(autouse=True)
    def _not_warned_yet(self, monkeypatch):
        monkeypatch.setattr(checks, "_warned_teacher_grad", False)

    @pytest.mark.parametrize(
        "tensor",
        [
            {"teacher_query": torch.zeros(B, H, Lq, Dt, requires_grad=True)},
            {"teacher_key": torch.zeros(B, H, Lk, Dt, requires_grad=True)},
            {"teacher_lse": torch.zeros(B, H, Lq, requires_grad=True)},
        ],
        ids=lambda value: next(iter(value)),
    )
    def test_warns_once(self, tensor):
        with pytest.warns(UserWarning, match="teacher tensor requires grad"):
            out = call(**tensor)
        assert not out.kl.requires_grad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(**tensor)

    def test_does_not_warn_where_no_gradient_is_computed(self):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            call(teacher_key=torch.zeros(B, H, Lk, Dt, requires_grad=True))


@pytest.mark.parametrize("scale", ["x", 10**400, float("nan")], ids=["text", "huge", "nan"])
def test_scale_that_is_no_number(scale):
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(InputError, match=r"^scale=.* is not a number"):
        attn_kd.attention(query, query, query, scale=scale)


def test_dropout_that_is_no_number():
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(InputError, match="dropout_p='a'"):
        attn_kd.attention(query, query, query, dropout_p="a")


def test_empty_teacher_lse():
    tensors = [torch.randn(1, 1, 2, 4) for _ in range(5)]
    with pytest.raises(InputError, match=r"^teacher_lse has shape \(0,\)"):
        attn_kd.attention_kl(*tensors, teacher_lse=torch.empty(0))
