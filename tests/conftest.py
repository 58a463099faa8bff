"""What all tests share: reproducible random numbers, hypothesis settings, GPUs, the real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

# A failure must come back when the test is run again, and machines differ in speed.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
# For a search beyond what every run repeats: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")

# A job that a script puts in the background ignores Ctrl-C, and so would the programs started by
# the tests that interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()
# Without a GPU the Triton kernels run in Triton's interpreter, on the CPU. It decides when a kernel
# is defined, so this stands before anything imports them.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that ATTN_KD_DATA names, one COCO folder per data set."""
    folder = os.environ.get("ATTN_KD_DATA")
    if not folder:
        pytest.skip("ATTN_KD_DATA is unset: it names the folder with the real data sets")
    if not Path(folder).is_dir():
        pytest.fail(f"ATTN_KD_DATA={folder} is not a folder")
    return Path(folder)
