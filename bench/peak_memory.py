"""Peak memory of one candidate's forward and backward, in a process of its own.

The figure is the growth of the process's resident set from the moment the inputs exist: what a
user's machine would need on top of them, the allocator's and the threads' scratch space included.
``python -m bench.peak_memory CANDIDATE SHAPE THREADS`` prints it in bytes. Linux only.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from bench.peers import CANDIDATES, forward_backward
from bench.workloads import SHAPES, Shape, make_workload

STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def peak_bytes_in_subprocess(candidate: str, shape: str, threads: int) -> int:
    """The growth of a fresh process's peak resident set over one forward and backward."""
    command = [sys.executable, "-m", "bench.peak_memory", candidate, shape, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def growth_of_peak(candidate: str, shape: str) -> int:
    """Bytes by which one forward and backward raises this process's peak resident set."""
    run = CANDIDATES[candidate]
    small = Shape(B=1, H=1, Lq=8, Lk=8, D=SHAPES[shape].D)
    forward_backward(run, make_workload(small, torch.float32))  # loads what is lazy
    workload = make_workload(SHAPES[shape], torch.float32)
    # What making the inputs has used must neither count nor be at hand for reuse.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    gradients = forward_backward(run, workload)
    after = _status_bytes("VmHWM")
    del gradients  # alive until here: they belong to the peak
    return after - before


def _status_bytes(field: str) -> int:
    # Not getrusage: on Linux its maximum is inherited from the parent across fork and exec.
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{STATUS} has no field {field}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(growth_of_peak(sys.argv[1], sys.argv[2]))
