"""The emulation notices what it claims to notice."""

from __future__ import annotations

import ctypes

import pytest

FAULTS = {
    "read_without_barrier": "nobody has written",
    "write_after_read_without_barrier": "has written since the last barrier",
    "read_before_any_write": "nobody has written",
    "copy_without_wait": "being copied to",
    "copy_over_what_is_read": "another thread has read since the last barrier",
    "barrier_of_some": "wait for others",
    "shuffle_of_some": "wait for others",
    "read_beyond_buffer": "outside of the registered buffers",
    "misaligned_copy": "not aligned",
    "misaligned_copy_of_zeros": "not aligned",
    "copy_of_zeros_from_nowhere": "from no address",
    "beyond_shared_memory": "outside of the shared memory",
    "write_to_input": "a write to a read-only buffer",
}


@pytest.fixture
def run(library: ctypes.CDLL):
    """Run a kernel of emulation/faulty_kernels.cpp; return the fault, or nothing."""
    library.emulation_run_faulty.restype = ctypes.c_char_p
    return lambda name: library.emulation_run_faulty(name.encode()).decode()


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(run, name):
    assert FAULTS[name] in run(name)


def test_right_kernel_runs(run):
    assert run("fine") == ""
