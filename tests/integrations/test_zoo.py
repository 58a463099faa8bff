"""attn_kd in every family of detectors: outputs, gradients, and one step of distillation each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from attn_kd import AttentionDistiller
from attn_kd.distill.layers import pair_layers
from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import attention_modules
from attn_kd.integrations.transformers import register
from tests.integrations.explicit_maps import divergence, explicit_maps, use
from tests.integrations.zoo import FAMILIES, Family, to

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def registered():
    register()


def outputs(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    output = model(**batch)
    return {name: output[name] for name in ("loss", "logits", "pred_boxes") if name in output}


@pytest.mark.parametrize(
    ("family", "padded"),
    [pytest.param(family, False, id=f"{name}-whole") for name, family in FAMILIES.items()]
    + [
        pytest.param(family, True, id=f"{name}-padded")
        for name, family in FAMILIES.items()
        if family.takes_pixel_mask
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_sdpa(family: Family, padded: bool):
    model = family.build(seed=0, layers=2)
    batch = family.batch(padded=padded)
    expected = outputs(use(model, "sdpa"), batch)
    actual = outputs(use(model, "attn_kd"), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@families
@torch.no_grad()
def test_public_setter_reaches_every_attention_layer(family: Family):
    model = family.build(seed=0)
    model.set_attn_implementation("attn_kd")
    modules = attention_modules(model).values()
    assert {module.config._attn_implementation for module in modules} == {"attn_kd"}


@pytest.fixture
def default_dtype(family):
    """Losses make tensors of the default dtype."""
    torch.set_default_dtype(family.loss_dtype)
    yield family.loss_dtype
    torch.set_default_dtype(torch.float32)


@families
def test_gradients_in_training_are_those_of_sdpa(family: Family, default_dtype: torch.dtype):
    model = family.build(seed=0).to(default_dtype).train()
    batch = to(family.batch(padded=True, labels=family.detects), default_dtype)
    gradients = {}
    for implementation in ("sdpa", "attn_kd"):
        use(model, implementation)
        torch.manual_seed(0)  # RT-DETR and D-FINE draw denoising queries
        result = outputs(model, batch)
        loss = result["loss"] if family.detects else result["logits"].square().sum()
        gradients[implementation] = _gradient(loss, model)
    assert gradients["sdpa"].norm() > 1e-3
    error = (gradients["attn_kd"] - gradients["sdpa"]).norm() / gradients["sdpa"].norm()
    assert error < 1000 * torch.finfo(default_dtype).eps


class Step:
    """One step of distillation of all layers of a kind, from 3 to 2, and two ways to it."""

    def __init__(self, family: Family, kind: str) -> None:
        self.student = family.build(seed=1)
        self.teacher = family.build(seed=2, layers=3, width=64)
        self.kind = kind
        pairs = pair_layers(self.student, self.teacher, "all", [kind])
        self.layers = {pair.student_path: pair.teacher_path for pair in pairs}
        self.batch = family.batch(padded=True)

    def fused(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The distiller's divergence and its gradient in all parameters, as one vector."""
        student, teacher = self._models(dtype)
        with AttentionDistiller(teacher, student, layers=self.layers) as distiller:
            result = distiller(**to(self.batch, dtype)).attention_kl
            return result.detach(), _gradient(result, student)

    def eager(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same from explicit maps."""
        student, teacher = self._models(dtype)
        batch = to(self.batch, dtype)
        with torch.no_grad(), explicit_maps(teacher) as teacher_maps:
            teacher(**batch)
        with explicit_maps(student) as student_maps:
            student(**batch)
        each = [
            divergence(
                student_maps[mine],
                teacher_maps[theirs],
                self_attention=self.kind.endswith("self"),
            )
            for mine, theirs in self.layers.items()
        ]
        result = torch.stack(each).mean()
        return result.detach(), _gradient(result, student)

    def _models(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.student).to(dtype), copy.deepcopy(self.teacher).to(dtype)


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, id=f"{name}-{kind}")
        for name, family in FAMILIES.items()
        for kind in family.layers
    ],
)
def test_distillation_step_is_that_of_eager_maps(family: Family, kind: str):
    step = Step(family, kind)
    truth = step.eager(torch.float64)
    assert truth[0] > 0.01  # the maps do differ
    assert truth[1].norm() > 1e-3
    torch.testing.assert_close(step.fused(torch.float64), truth, rtol=1e-6, atol=1e-9)
    fused, eager = step.fused(torch.float32), step.eager(torch.float32)
    # Twice eager's error, and some roundings: in a single number eager's may cancel by luck, and in
    # the gradient the teacher's LSE, kept in float32, and the other layers' SDPA have their own.
    for ours, theirs, exact, roundings in zip(fused, eager, truth, (32, 16), strict=True):
        error, bar = ((x.double() - exact).norm() for x in (ours, theirs))
        assert error <= 2 * bar + roundings * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, id=f"{name}-{kind}")
        for name, family in FAMILIES.items()
        for kind in family.deformable
    ],
)
def test_deformable_attention_is_refused_with_the_reason(family: Family, kind: str):
    student, teacher = family.build(seed=1), family.build(seed=2)
    path = family.deformable[kind]
    with pytest.raises(InputError, match=r"deformable attention .* no map over the keys"):
        AttentionDistiller(teacher, student, kinds=[kind])
    with pytest.raises(InputError, match=f"{path!r} is deformable attention"):
        AttentionDistiller(teacher, student, layers={path: path})


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("rf-detr", {"group_detr": 3}, r"group_detr=3 groups.*with group_detr=1"),
        ("lw-detr", {"group_detr": 3}, r"group_detr=3 groups.*with group_detr=1"),
        ("rt-detr", {}, r"num_denoising=4 adds queries.*with num_denoising=0"),
        ("d-fine", {}, r"num_denoising=4 adds queries.*with num_denoising=0"),
    ],
)
def test_queries_that_only_training_has_are_named(name: str, setting: dict, message: str):
    family = FAMILIES[name]
    student, teacher = family.build(seed=1, **setting), family.build(seed=2)
    student.train()
    with (
        AttentionDistiller(teacher, student, kinds=["decoder_self"]) as distiller,
        pytest.raises(InputError, match=message),
    ):
        distiller(**family.batch(labels=True))


@pytest.mark.parametrize(
    ("name", "setting"),
    [("rf-detr", {"group_detr": 3}), ("rt-detr", {})],
    ids=["rf-detr", "rt-detr"],
)
def test_encoder_is_distilled_in_training_with_labels_all_the_same(name: str, setting: dict):
    family = FAMILIES[name]
    student, teacher = family.build(seed=1, **setting), family.build(seed=2)
    student.train()
    with AttentionDistiller(teacher, student) as distiller:
        result = distiller(**family.batch(labels=True))
        (result.student.loss + result.attention_kl).backward()
    assert result.attention_kl > 0.01
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
