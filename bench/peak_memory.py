"""Peak memory of a piece of work: in a process of its own, or as torch's allocator counts on a GPU.

On a CPU the figure is the growth of the process's resident set from the moment the inputs exist:
what a user's machine would need on top of them, the threads' scratch space included. Linux only.
``python -m bench.peak_memory THREADS CANDIDATE B H Lq Lk D`` prints it, in bytes, of one
candidate's forward and backward.

On a GPU it is what torch's allocator has handed out at the most, in this process; the context of
CUDA and what libraries allocate for themselves is not in it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.peers import CANDIDATES, forward_backward
from bench.workloads import Shape, make_workload

STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs
LOCK_PRESENT_PAGES = 1 | 4  # MCL_CURRENT | MCL_ONFAULT, mlock(2)
# Larger blocks go back to the system when freed. This is where glibc starts; but then it adapts,
# and what the heap happens to keep changes the figure of a whole model by a third.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def peak_bytes_in_subprocess(module: str, *arguments: object) -> int:
    """What ``python -m MODULE THREADS ARGUMENTS`` prints, with this process's number of threads."""
    words = [str(argument) for argument in (torch.get_num_threads(), *arguments)]
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, **ALLOCATOR},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout)


def growth_of_peak(work: Callable[[], object]) -> int:
    """Bytes by which the work, its result included, raises this process's peak resident set.

    The caller has done some such work before, smaller: it loads what is loaded when first used.
    """
    # What making the inputs has used must neither count nor be at hand for reuse.
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    # Where memory is short, the system would drop library code meanwhile, and the growth would
    # look smaller. Refused (without harm) to users who may not lock that much.
    libc.mlockall(LOCK_PRESENT_PAGES)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    result = work()
    after = _status_bytes("VmHWM")
    libc.munlockall()
    del result  # alive until here: gradients belong to the peak
    return after - before


def growth_on_gpu(work: Callable[[], object]) -> int:
    """Bytes by which the work, its result included, raises the peak of torch's CUDA allocator.

    The caller has done some such work before, smaller: the workspaces of libraries stay.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    torch.cuda.synchronize()
    after = torch.cuda.max_memory_allocated()
    del result  # alive until here: gradients belong to the peak
    return after - before


def of_candidate(candidate: str, shape: Shape) -> int:
    """Growth of the peak by one candidate's forward and backward, float32."""
    run = CANDIDATES[candidate]
    small = Shape(B=1, H=1, Lq=8, Lk=8, D=shape.D)
    forward_backward(run, make_workload(small, torch.float32))
    workload = make_workload(shape, torch.float32)
    return growth_of_peak(lambda: forward_backward(run, workload))


def _status_bytes(field: str) -> int:
    # Not getrusage: on Linux its maximum is inherited from the parent across fork and exec.
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{STATUS} has no field {field}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(of_candidate(sys.argv[2], Shape(*map(int, sys.argv[3:]))))
