"""The whole training step under torch.compile: teacher, student, loss and backward pass.

Counted with torch 2.13 and transformers 5.23. With both models in evaluation mode, teacher, student
and divergence are one graph, and the call of backward() is the one break. In training mode
transformers' DETR breaks it: each encoder layer asks whether its output is finite, and branches on
the answer (6 breaks, 7 graphs, with one layer). The frames around such a break that hold a context
manager, attn_kd's among them, run uncompiled; the operator stays in a graph. With DETR's own
detection loss, in evaluation mode, there are 18 breaks (19 graphs) or, beside a recorded teacher,
17: its Hungarian matching runs in SciPy and its checks branch on values. No break is attn_kd's in
either mode.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import attn_kd
from attn_kd.distill import AttentionDistiller, TeacherRecorder, distillation_loss
from tests.tiny_detr import tiny_batch, tiny_detr

PACKAGE = Path(attn_kd.__file__).parent


@pytest.fixture
def models():
    torch._dynamo.reset()
    counters.clear()
    return tiny_detr(seed=1, encoder_layers=1), tiny_detr(seed=2, encoder_layers=1)


def operators(graphs):
    """Return the nodes of the graphs that compute attention and divergence."""
    return [
        node
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function" and "attention_kl_forward" in str(node.target)
    ]


def take(step, student, batch):
    """Return the loss of a step and the gradients it leaves."""
    student.zero_grad()
    loss = step(batch)
    return loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_step_is_one_graph_before_backward(models):
    student = models[1]
    with AttentionDistiller(*models) as distiller:

        def step(batch):
            result = distiller(**batch)
            loss = result.attention_kl + result.student.logits.square().mean()
            loss.backward()
            return loss.detach()

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, backend=counter)
        batches = [tiny_batch(seed=seed) for seed in (0, 1)]
        actual = [take(compiled, student, batch) for batch in batches]
        assert [key.split("\n")[0] for key in counters["graph_break"]] == [
            "Unsupported Tensor.backward() call"
        ]
        assert sum(counters["graph_break"].values()) == 1
        assert counter.frame_count == 2  # for both batches, before backward and after
        expected = [take(step, student, batch) for batch in batches]
    torch.testing.assert_close(actual, expected)


def explain(step, student, batch):
    """What torch.compile makes of a step, whose gradients must be those of the step as it is."""
    _, expected = take(step, student, batch)
    student.zero_grad()
    explained = torch._dynamo.explain(step)(batch)
    actual = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    torch.testing.assert_close(actual, expected)
    return explained


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")  # of what the detection loss calls
def test_detection_loss_breaks_the_graph_but_the_operator_does_not(models):
    student, batch = models[1], tiny_batch(labels=True)
    with AttentionDistiller(*models) as distiller:
        # Dynamo traces a frame anew for every function that a break lies in: the teacher stays out.
        with TeacherRecorder(models[0], distiller.layers.values()) as recorder:
            given = recorder({name: batch[name] for name in ("pixel_values", "pixel_mask")})

        def step(batch):
            result = distiller.run(batch, teacher_pass=given)
            loss = distillation_loss(result, alpha=0.7).total
            loss.backward()
            return loss.detach()

        explained = explain(step, student, batch)
    detection_loss = Path(transformers.__file__).parent / "loss" / "loss_for_object_detection.py"
    for reason in explained.break_reasons:
        files = [Path(frame.filename) for frame in reason.user_stack]
        assert PACKAGE not in files[-1].parents
        assert detection_loss in files or "Tensor.backward()" in reason.reason
    assert len(operators(explained.graphs)) == 1
    assert explained.graph_break_count <= 17


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_model_in_training_mode_breaks_the_graph_but_the_operator_does_not(models):
    student, batch = models[1].train(), tiny_batch()
    with AttentionDistiller(*models) as distiller:

        def step(batch):
            result = distiller(**batch)
            loss = result.attention_kl + result.student.logits.square().mean()
            loss.backward()
            return loss.detach()

        explained = explain(step, student, batch)
    model = Path(transformers.__file__).parent / "models" / "detr" / "modeling_detr.py"
    for reason in explained.break_reasons:
        where = Path(reason.user_stack[-1].filename)
        assert PACKAGE not in where.parents
        assert where == model or "Tensor.backward()" in reason.reason
    assert operators(explained.graphs)
