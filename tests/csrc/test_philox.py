"""The kernels' Philox4x32-10, against published words and against the one in torch."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from attn_kd.ops import philox
from tests.ops.cases import Sizes, random_inputs
from tests.ops.test_philox import KNOWN_ANSWERS

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize(
    ("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys()
)
def test_known_answers(module, counter, key, words):
    lanes = 9  # more than any vector has
    counters = torch.tensor(counter).expand(lanes, 4)
    assert torch.equal(module.philox(counters, *key), torch.tensor(words).expand(lanes, 4))


def test_random_counters(module):
    counters = torch.randint(0, 2**32, (1000, 4))
    key = (0xDEADBEEF, 0x01234567)
    columns = philox.philox(tuple(counters.unbind(1)), tuple(torch.tensor(word) for word in key))
    assert torch.equal(module.philox(counters, *key), torch.stack(columns, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("Lq", [1, 15, 33, 65], ids=lambda n: f"{n} queries")
@pytest.mark.parametrize("Lk", [1, 6, 97, 150], ids=lambda n: f"{n} keys")
def test_mask_of_every_tile(Lk, Lq, dtype):
    """The map that reaches the output is dropped where the definition says, whatever the tiles."""
    query, key = random_inputs(Sizes(Lq=Lq, Lk=Lk), dtype)[:2]
    B, H = query.shape[:2]
    identity = torch.eye(Lk, dtype=dtype).expand(B, H, -1, -1)
    torch.manual_seed(11)
    dropped = attn_kd.attention(query, key, identity, dropout_p=0.4, backend="cpu").output
    torch.manual_seed(11)
    seed = philox.draw_seed(torch.device("cpu"))
    assert torch.equal(dropped != 0, philox.keep_mask(seed, 0.4, (B, H, Lq, Lk)))
