"""Modules that carry their tap: one pass long, nested, checkpointed, compiled, replicated."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attn_kd.nn
from attn_kd.nn import FuseTap, RecordTap, TapReservation, carried_taps, is_self_attention_name
from attn_kd.nn.carriers import carried_attention, carried_tap, carries_tap
from tests.nn.layers import Listener

EMBED, HEADS, LENGTH, BATCH = 8, 2, 6, 3


def layer(seed, **options):
    torch.manual_seed(seed)
    made = attn_kd.nn.MultiheadAttention(EMBED, HEADS, **options).double()
    nn.init.normal_(made.in_proj_weight)
    return made


class Block(nn.Module):
    """An encoder layer in the style of DETR: activations before and after the attention."""

    def __init__(self, attention, need_weights=False):
        super().__init__()
        self.self_attn = attention
        self.linear = nn.Linear(EMBED, EMBED, dtype=torch.float64)
        self.norm = nn.LayerNorm(EMBED, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x):
        q = k = x + 1.0
        mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        mask[0, -2:] = True
        mixed, _ = self.self_attn(q, k, x, key_padding_mask=mask, need_weights=self.need_weights)
        return self.norm(x + self.linear(mixed).relu())


class Checkpointed(nn.Module):
    """A block that is run again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LENGTH, BATCH, EMBED, generator=generator, dtype=torch.float64)


def fuse_tap(teacher, x):
    tap = RecordTap("teacher")
    with torch.no_grad(), carried_taps([(teacher, tap)]):
        teacher(x, x, x, need_weights=False)
    return FuseTap(
        tap.record,
        layer="student",
        teacher_layer="teacher",
        self_attention=True,
        divergence="reverse_kl",
        head_reduction="none",
    )


def distil(student, attention, teacher, x):
    """One pass; return the student's output and mean divergence."""
    tap = fuse_tap(teacher, x)
    with carried_taps([(attention, tap)]):
        output = student(x)
    tap.close()
    return output, tap.kl.mean()


@pytest.fixture
def attention():
    return layer(1)


@pytest.fixture
def teacher():
    return layer(2)


def test_tap_is_carried_for_one_pass_and_leaves_nothing(attention):
    before, tap = set(vars(attention)), Listener()
    with carried_taps([(attention, tap)]):
        attention(*[images(0)] * 3, need_weights=False)
    attention(*[images(0)] * 3, need_weights=False)
    assert tap.calls == 1
    assert set(vars(attention)) == before


def test_tap_is_gone_after_an_exception(attention):
    with pytest.raises(ZeroDivisionError), carried_taps([(attention, Listener())]):
        _ = 1 / 0
    assert carried_tap(attention) is None


def test_pass_inside_a_pass_gives_the_tap_back(attention):
    outer, inner = Listener(), Listener()
    with carried_taps([(attention, outer)]):
        with carried_taps([(attention, inner)]):
            assert carried_tap(attention) is inner
        assert carried_tap(attention) is outer


def test_any_module_can_carry():
    module, x = nn.Identity(), torch.randn(1, 2, 3, 4)
    tap = Listener()
    with carried_taps([(module, tap)]):
        assert carries_tap(module)
        carried_attention(module, x, x, x, attn_mask=None)
    assert not carries_tap(module)
    assert tap.calls == 1


def test_tap_gets_the_dropout_of_training_alone(attention):
    seen = []

    class Heard(Listener):
        def attend(self, *tokens, dropout_p=0.0, **arguments):
            seen.append(dropout_p)
            return super().attend(*tokens, **arguments)

    attention.dropout = 0.25
    with carried_taps([(attention, Heard())]):
        for training in (True, False):
            attention.train(training)(*[images(0)] * 3, need_weights=False)
    assert seen == [0.25, 0.0]


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
def test_tapped_layer_returns_what_it_returns_alone(attention, teacher, need_weights):
    x = images(0)
    expected = attention(x, x, x, need_weights=need_weights)
    tap = fuse_tap(teacher, x)
    with carried_taps([(attention, tap)]):
        actual = attention(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(actual, expected)
    assert tap.kl.shape == (BATCH, HEADS, LENGTH)


def test_keys_that_are_no_tokens_are_refused(teacher):
    extended = layer(1, add_zero_attn=True)
    with (
        carried_taps([(extended, Listener())]),
        pytest.raises(attn_kd.InputError, match=r"add_zero_attn.*without them"),
    ):
        extended(*[images(0)] * 3)


def gradients(block, teacher, wrap):
    """Gradients of a loss over two passes, in which output and divergence count."""
    loss = 0.0
    for seed in (1, 2):
        output, kl = distil(wrap(block), block.self_attn, teacher, images(seed))
        loss = loss + seed * kl + output.square().mean()
    return torch.autograd.grad(loss, list(block.parameters()))


def unwrapped(block):
    return block


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "output+map"])
def test_checkpointed_passes_recompute_with_their_own_divergence(
    attention, teacher, need_weights, dropout
):
    attention.dropout = dropout
    block = Block(attention, need_weights)
    torch.manual_seed(5)
    expected = gradients(block, teacher, unwrapped)
    reservation = TapReservation(attention)
    torch.manual_seed(5)
    actual = gradients(block, teacher, Checkpointed)
    reservation.undo()
    torch.testing.assert_close(actual, expected)
    assert not carries_tap(attention)


def test_checkpointing_without_a_reservation_is_an_error_not_a_wrong_gradient(attention, teacher):
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(Block(attention), teacher, Checkpointed)


def test_reservation_changes_no_gradient_without_checkpointing(attention, teacher):
    block = Block(attention)
    expected = gradients(block, teacher, unwrapped)
    TapReservation(attention)
    torch.testing.assert_close(gradients(block, teacher, unwrapped), expected, rtol=0, atol=0)


def test_reservations_are_counted(attention):
    first, second = TapReservation(attention), TapReservation(attention)
    first.undo()
    assert carries_tap(attention)
    second.undo()
    assert not carries_tap(attention)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copy_of_a_reserved_layer_is_free(attention, duplicate):
    reservation = TapReservation(attention)
    copied = duplicate(attention)
    assert not carries_tap(copied)
    own = TapReservation(copied)
    reservation.undo()
    assert carries_tap(copied)
    own.undo()
    assert set(vars(copied)) == set(vars(attention))


def test_reserved_layer_does_not_keep_itself_alive(attention):
    TapReservation(attention)
    query = torch.randn(1, HEADS, LENGTH, 4, requires_grad=True)
    alive = weakref.ref(query)
    gc.disable()
    try:
        output = carried_attention(attention, query, query, query, attn_mask=None)
        del output, query
        assert alive() is None
    finally:
        gc.enable()


def test_checkpointing_still_frees_the_rest_of_a_reserved_layer(attention, teacher):
    block = Block(attention)
    kept = {}
    for name, wrap in (("whole", unwrapped), ("checkpointed", Checkpointed)):
        TapReservation(attention)
        packed = []
        # Outside the block's own hooks: what checkpointing lets through is what it keeps.
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, packed=packed: packed.append(x.numel()) or x, lambda x: x
        ):
            distil(wrap(block), attention, teacher, images(0))
        kept[name] = len(packed)
    assert kept["checkpointed"] < kept["whole"] / 4


def test_compiled_student_is_one_graph_and_is_compiled_once(attention, teacher):
    torch._dynamo.reset()
    block = Block(attention)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    TapReservation(attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = gradients(block, teacher, lambda _: compiled)
    torch.testing.assert_close(actual, gradients(block, teacher, unwrapped))


def test_checkpointed_student_compiled_with_graph_breaks(attention, teacher):
    torch._dynamo.reset()
    block = Block(attention)
    compiled = torch.compile(Checkpointed(block), backend="eager")
    TapReservation(attention)
    actual = gradients(block, teacher, lambda _: compiled)
    torch.testing.assert_close(actual, gradients(block, teacher, unwrapped))


def test_replica_of_distributed_data_parallel(attention, teacher, tmp_path):
    block = Block(attention)
    expected = gradients(block, teacher, unwrapped)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(Checkpointed(block))
        TapReservation(attention)
        for seed in (1, 2):
            output, kl = distil(replica, attention, teacher, images(seed))
            (seed * kl + output.square().mean()).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([p.grad for p in block.parameters()], list(expected))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("transformer.encoder.layers.5.self_attn", True),
        ("transformer.decoder.layers.0.self_attn", True),
        ("transformer.decoder.layers.0.multihead_attn", False),
        ("model.decoder.layers.0.encoder_attn", False),
        ("decoder.layers.1.cross_attn", False),
        ("blocks.3.attn", True),
        ("", True),
    ],
)
def test_kind_by_name(path, expected):
    assert is_self_attention_name(path) is expected
