"""The distiller under autocast, activation checkpointing, torch.compile, and a wrapped student."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attn_kd import available_backends
from attn_kd.distill import AttentionDistiller
from attn_kd.errors import InputError
from tests.distill.explicit import explicit_encoder_kl, gradients
from tests.tiny_detr import checkpoint_activations, tiny_batch, tiny_detr


@pytest.fixture
def teacher():
    return tiny_detr(seed=1)


@pytest.fixture
def student():
    return tiny_detr(seed=2)


class Autocast(nn.Module):
    """A model that runs under bfloat16 autocast on its own account, as accelerate makes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


@pytest.mark.parametrize("roles", [{"teacher"}, {"student"}, {"teacher", "student"}], ids="+".join)
def test_either_model_may_run_under_autocast(teacher, student, roles):
    batch = tiny_batch()
    expected = explicit_encoder_kl(copy.deepcopy(student), copy.deepcopy(teacher), batch)
    models = {"teacher": teacher, "student": student}
    models |= {role: Autocast(models[role]) for role in roles}
    with AttentionDistiller(**models) as distiller:
        result = distiller(**batch)
        result.attention_kl.backward()
    assert result.attention_kl.dtype == torch.float32
    # bfloat16 has 8 bits: weights, activations and logits of the layers before are off by 2 ** -8.
    torch.testing.assert_close(result.attention_kl, expected, rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in student.model.encoder.layers[0].parameters())


def test_distiller_called_under_autocast(teacher, student):
    batch = tiny_batch()
    expected = explicit_encoder_kl(copy.deepcopy(student), copy.deepcopy(teacher), batch)
    with AttentionDistiller(teacher, student) as distiller, torch.autocast("cpu", torch.bfloat16):
        actual = distiller(**batch).attention_kl
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_bfloat16_gradients_are_at_least_as_accurate_as_those_of_explicit_maps(
    teacher, student, divergence
):
    exact = explicit_gradients(student, teacher, tiny_batch(dtype=torch.float64), divergence)
    with torch.autocast("cpu", torch.bfloat16):
        eager = explicit_gradients(student, teacher, tiny_batch(), divergence)
        with AttentionDistiller(teacher, student, divergence=divergence) as distiller:
            result = distiller(**tiny_batch())
    actual = gradients(result.attention_kl, student)
    errors = [
        sum((found[name].double() - exact[name]).square().sum() for name in exact).sqrt()
        for found in (actual, eager)
    ]
    assert errors[1] > 0
    assert errors[0] <= 2 * errors[1]


def explicit_gradients(student, teacher, batch, divergence):
    """Return the gradients of the explicit divergence in the dtype of the batch, as float64."""
    models = [copy.deepcopy(m).to(batch["pixel_values"].dtype) for m in (student, teacher)]
    kl = explicit_encoder_kl(*models, batch, divergence=divergence)
    return {name: found.double() for name, found in gradients(kl, models[0]).items()}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_student_mode_and_gradient_mode(teacher, student, training, grad):
    expected = explicit_encoder_kl(copy.deepcopy(student), copy.deepcopy(teacher), tiny_batch())
    student.train(training)
    with AttentionDistiller(teacher, student) as distiller, torch.set_grad_enabled(grad):
        actual = distiller(**tiny_batch()).attention_kl
    assert actual.requires_grad is grad
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def encoder_gradients(model, loss):
    return torch.autograd.grad(loss, [*model.model.encoder.layers[0].parameters()])


def test_checkpointed_layers_recompute_with_the_record_of_their_own_pass(teacher, student):
    student.train()
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]
    with AttentionDistiller(teacher, student) as distiller:
        expected = encoder_gradients(
            student, sum(distiller(**batch).attention_kl for batch in batches)
        )
        checkpoint_activations(student)
        results = [distiller(**batch).attention_kl for batch in batches]
        actual = encoder_gradients(student, sum(results))
    torch.testing.assert_close(actual, expected)


def gradients_of(student, distiller, batches):
    """Return the student's gradients of the mean divergence over batches of equal rows."""
    student.zero_grad()
    for batch in batches:
        (distiller(**batch).attention_kl / len(batches)).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"divergence": "js"}, id="js"),
        pytest.param({"head_reduction": "mean"}, id="mean"),
        pytest.param({"head_map": [3, 2, 1, 0]}, id="head-map"),
        pytest.param({"alignment": "group", "teacher_grid": (2, 8, 4)}, id="group"),
        pytest.param({"alignment": "resample", "teacher_grid": (4, 16)}, id="resample"),
    ],
)
def test_checkpointing_of_every_layer_changes_no_gradient(teacher, student, options):
    student.train()
    kinds = ("encoder_self", "decoder_self", "decoder_cross")
    batch = tiny_batch(padded=False)
    if options.get("alignment") == "group":
        # A student of 8 x 4 tokens, whose teacher has two frames of them.
        narrow = {name: tensor[..., :32] for name, tensor in batch.items()}
    else:
        narrow = batch
    results = []
    with AttentionDistiller(teacher, student, "all", kinds=kinds, **options) as distiller:
        for _ in range(2):
            result = distiller.run(narrow, teacher_inputs=batch)
            assert len(result.attention_kl_per_layer) == 4
            loss = result.attention_kl + result.student.logits.square().mean()
            results.append(gradients(loss, student))
            checkpoint_activations(student)
    torch.testing.assert_close(*results)


def test_accumulated_gradients_are_those_of_the_whole_batch(teacher, student):
    teacher, student = teacher.double(), student.double()
    whole = tiny_batch(padded=False, dtype=torch.float64)
    halves = [{name: tensor[n : n + 1] for name, tensor in whole.items()} for n in range(2)]
    with AttentionDistiller(teacher, student) as distiller:
        expected = gradients_of(student, distiller, [whole])
        actual = gradients_of(student, distiller, halves)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_reentrant_checkpointing_is_refused(teacher, student):
    student.train()
    checkpoint_activations(student, {"use_reentrant": True})
    with (
        AttentionDistiller(teacher, student) as distiller,
        pytest.raises(InputError, match="use_reentrant=False"),
    ):
        distiller(**tiny_batch())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="paper"),
        pytest.param(
            {"alignment": "group", "teacher_grid": (2, 8, 8), "head_map": [3, 2, 1, 0]},
            id="grouped-and-mapped",
        ),
    ],
)
def test_compiled_student_is_one_graph_and_is_compiled_once(teacher, student, options):
    torch._dynamo.reset()
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]
    with AttentionDistiller(teacher, student, **options) as distiller:

        def run(batch, student):
            if not options:
                return distiller.run(batch, student=student)
            pixels = batch["pixel_values"].repeat(1, 1, 2, 1)  # twice as many tokens
            return distiller.run(batch, teacher_inputs={"pixel_values": pixels}, student=student)

        compiled = torch.compile(student, backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = [run(batch, compiled) for batch in batches]
        expected = [run(batch, student) for batch in batches]
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one.attention_kl, other.attention_kl)
            torch.testing.assert_close(
                encoder_gradients(student, one.attention_kl),
                encoder_gradients(student, other.attention_kl),
            )


def test_student_run_through_distributed_data_parallel(teacher, student, tmp_path):
    with AttentionDistiller(teacher, student) as distiller:
        expected = encoder_gradients(student, distiller(**tiny_batch()).attention_kl)
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            replica = nn.parallel.DistributedDataParallel(student)
            result = distiller.run(tiny_batch(), student=replica)
            (result.attention_kl + 0.0 * result.student.logits.sum()).backward()
        finally:
            torch.distributed.destroy_process_group()
    actual = [p.grad for p in student.model.encoder.layers[0].parameters()]
    torch.testing.assert_close(actual, list(expected))


def test_student_run_through_a_wrapper(teacher, student):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    wrapper = Wrapper(student)
    with AttentionDistiller(teacher, student) as distiller:
        result = distiller.run(tiny_batch(), student=wrapper)
        expected = distiller(**tiny_batch())
    assert wrapper.calls == 1
    assert result.attention_kl == expected.attention_kl


@pytest.mark.skipif(not available_backends()["cpu"].available, reason="needs the compiled kernels")
def test_nothing_of_the_size_of_a_map_is_kept_for_backward(teacher, student):
    size, tokens = 256, 32 * 32
    batch = {
        "pixel_values": torch.randn(1, 3, size, size),
        "pixel_mask": torch.ones(1, size, size, dtype=torch.long),
    }
    batch["pixel_mask"][..., 200:] = 0
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with (
        AttentionDistiller(teacher, student) as distiller,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        distiller(**batch)
    assert max(sizes) < tokens * tokens
