"""Clocks, and what is said of a device."""

from __future__ import annotations

import time

import pytest
import torch

from bench.devices import (
    HEAD_START_CYCLES,
    LONGEST_HEAD_START,
    EventClock,
    SynchronizedClock,
    WallClock,
    clock_for,
    describe_gpu,
)
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


class FakeGPU:
    """Sleeps a cycle in a tick, and does everything else at once; its events tell the tick."""

    def __init__(self, monkeypatch):
        self.now, self.idle_at, self.sleeps = 0, 0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = max(gpu.now, gpu.idle_at)

            def query(self):
                return self.at <= gpu.now

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.sleeps.append(cycles)
        self.idle_at = max(self.now, self.idle_at) + cycles

    def call(self, host, device):
        """A call that takes the host some ticks and then the GPU some."""
        self.now += host
        self.idle_at = max(self.now, self.idle_at) + device


@pytest.mark.parametrize(
    ("host", "head_starts"), [(0.5, [1, 1]), (1.5, [1, 2, 2]), (7, [1, 2, 4, 8, 8])]
)
def test_a_call_that_begins_too_early_gets_a_longer_head_start(monkeypatch, host, head_starts):
    gpu, clock = FakeGPU(monkeypatch), EventClock()
    times = [clock.seconds(lambda: gpu.call(host * HEAD_START_CYCLES, 20)) for _ in range(2)]
    assert times == [0.02, 0.02]
    assert gpu.sleeps == [cycles * HEAD_START_CYCLES for cycles in head_starts]


def test_a_head_start_has_an_end(monkeypatch):
    gpu, clock = FakeGPU(monkeypatch), EventClock()
    assert clock.seconds(lambda: gpu.call(2 * LONGEST_HEAD_START, 20)) > 0.02
    assert gpu.sleeps[-1] == LONGEST_HEAD_START


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
        "driver": "580.65",
    }
    expected = "A GPU (sm_90, 80 GiB); driver 580.65, CUDA 13.0, cuDNN 9, Triton 3.7.1; "
    assert machine_line(run).startswith(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("clock", [EventClock(), SynchronizedClock()], ids=["event", "wall"])
def test_a_gpus_clock_gives_seconds(clock):
    work = torch.randn(512, 512, device="cuda")
    assert 0 < clock.seconds(lambda: work @ work) < 60
