"""Clocks, and what is said of a device."""

from __future__ import annotations

import time

import pytest
import torch

from bench.devices import EventClock, SynchronizedClock, WallClock, clock_for, describe_gpu
from bench.rounds import SUBJECT, PeersInTurn
from bench.summary import machine_line
from tests.bench.runs import run_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class CountingClock:
    """Everything takes a second."""

    def seconds(self, function):
        function()
        return 1.0


def test_the_subject_is_timed_by_the_clock_of_its_peers():
    peers = PeersInTurn({"sdpa": lambda: None}, clock=CountingClock())
    subject = peers.timed(lambda: None)
    for _ in range(4):
        peers()
        subject()
    peers.finish()
    assert peers.seconds == {"sdpa": [1.0] * 4, SUBJECT: [1.0] * 4}


def test_a_wall_clock_sees_the_whole_call():
    assert WallClock().seconds(lambda: time.sleep(0.01)) >= 0.01


@pytest.mark.parametrize(
    ("device", "calls", "expected"),
    [(CPU, 1, WallClock), (CPU, 50, WallClock), (GPU, 1, EventClock), (GPU, 50, SynchronizedClock)],
    ids=["cpu", "cpu calls", "gpu", "gpu calls"],
)
def test_each_device_has_its_clock(device, calls, expected):
    assert type(clock_for(device, calls=calls)) is expected


def test_a_cpu_is_no_gpu():
    assert describe_gpu(CPU) is None


def test_a_run_on_a_gpu_says_on_which():
    run = run_of(device="cuda")
    run.machine.update(
        cpu={}, machine="x86_64", cpus=1, system="Linux", python_version="3", triton="3.7.1"
    )
    run.machine["torch"] = {"version": "2", "threads": 1, "capability": "AVX2"}
    run.machine["attn_kd"] = {"version": "0", "instruction_set": None}
    run.machine["gpu"] = {
        "name": "A GPU",
        "capability": "sm_90",
        "memory_bytes": 80 * 2**30,
        "cuda": "13.0",
        "cudnn": 9,
    }
    expected = "A GPU (sm_90, 80 GiB); CUDA 13.0, cuDNN 9, Triton 3.7.1; "
    assert machine_line(run).startswith(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("clock", [EventClock(), SynchronizedClock()], ids=["event", "wall"])
def test_a_gpus_clock_gives_seconds(clock):
    work = torch.randn(512, 512, device="cuda")
    assert 0 < clock.seconds(lambda: work @ work) < 60
