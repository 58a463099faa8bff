"""The noise of dropout: the published generator, and the mask that is made of it."""

from __future__ import annotations

import pytest
import torch

from attn_kd.ops.philox import draw_seed, keep_mask, philox

SEED = torch.tensor([0x1234567890ABCDEF, 42])
SHAPE = (2, 3, 40, 50)

# Of Random123's kat_vectors: counter, key, words of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(
    ("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys()
)
def test_known_answers(counter, key, words):
    counter, key = (tuple(torch.tensor(word) for word in given) for given in (counter, key))
    assert tuple(int(word) for word in philox(counter, key)) == words


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_rate(dropout_p):
    kept = keep_mask(SEED, dropout_p, (4, 8, 100, 100))
    deviation = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - dropout_p)) < 4 * deviation


@pytest.mark.parametrize(
    ("dropout_p", "all_kept"), [(2.0**-33, True), (1 - 2.0**-33, False)], ids=["tiny", "almost 1"]
)
def test_probabilities_at_the_ends(dropout_p, all_kept):
    """Each less than one word in 2**32 away from keeping all, or nothing."""
    assert (keep_mask(SEED, dropout_p, SHAPE) == all_kept).all()


@pytest.mark.parametrize("dim", range(4), ids=["batch", "heads", "rows", "keys"])
def test_neighbours_are_uncorrelated(dim):
    kept = keep_mask(SEED, 0.5, (8, 8, 64, 64)).double() * 2 - 1
    length = kept.shape[dim] - 1
    product = kept.narrow(dim, 0, length) * kept.narrow(dim, 1, length)
    assert abs(product.mean()) < 4 / product.numel() ** 0.5


@pytest.mark.parametrize("changed", [0, 1], ids=["seed", "offset"])
def test_another_seed_or_offset_is_unrelated(changed):
    other = SEED.clone()
    other[changed] += 1
    first, second = (keep_mask(seed, 0.5, (4, 4, 64, 64)) for seed in (SEED, other))
    agreement = (first == second).double()
    assert abs(agreement.mean() - 0.5) < 4 * 0.5 / agreement.numel() ** 0.5


def test_rows_and_keys_are_those_of_a_larger_map():
    """A pair's noise depends on its place alone, whatever is computed beside it."""
    whole = keep_mask(SEED, 0.4, SHAPE)
    assert torch.equal(keep_mask(SEED, 0.4, (2, 3, 7, 50), first_row=20), whole[:, :, 20:27])
    assert torch.equal(keep_mask(SEED, 0.4, (2, 3, 40, 13)), whole[..., :13])


def test_the_seed_comes_from_the_default_generator():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
