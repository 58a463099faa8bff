"""The message of an error is told by whatever stands between its origin and the user."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from attn_kd import attention
from attn_kd.errors import InputError


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index):
        raise InputError("image 7 is upside down")


def test_process_that_loads_data_hands_on_the_message_alone():
    with pytest.raises(InputError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert str(caught.value) == "image 7 is upside down"


def test_copy_has_the_message():
    assert str(pickle.loads(pickle.dumps(InputError("a")))) == "a"


@pytest.mark.parametrize(
    ("fullgraph", "error"), [(False, InputError), (True, RuntimeError)], ids=["breaks", "fullgraph"]
)
def test_compiled_function_tells_what_is_wrong(fullgraph, error):
    query = torch.zeros(1, 2, 5, 8)
    function = torch.compile(
        lambda query: attention(query, query[..., :4], query).output,
        backend="eager",
        fullgraph=fullgraph,
    )
    with pytest.raises(error, match="key has head_dim 4, expected 8 as in query"):
        function(query)
    torch.compiler.reset()
