"""Candidates timed in turn, round by round, so that all meet the same machine.

pytest-benchmark times one function per test. Here that is attn_kd's; what pytest-benchmark calls
the setup of each of its rounds, untimed for it, runs the peers with the same clock. The order of
all of them is shuffled from round to round, so that nobody always runs after the same predecessor.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

SUBJECT = "attn_kd"
MIN_ROUNDS, MAX_ROUNDS = 5, 200

Function = Callable[[], object]


class PeersInTurn:
    """Runs the peers before and after each timed call of the subject; keeps the times, in seconds.

    A call of this object ends one round, with the peers whose turn is after the subject, and begins
    the next, with those before it. `finish` ends the last one.
    """

    def __init__(self, peers: dict[str, Function]) -> None:
        self.peers = peers
        self.seconds: dict[str, list[float]] = {name: [] for name in peers}
        self._after_subject: list[str] = []
        self._random = random.Random(0)

    def __call__(self) -> None:
        self.finish()
        names = [SUBJECT, *self.peers]
        self._random.shuffle(names)
        turn = names.index(SUBJECT)
        self._after_subject = names[turn + 1 :]
        self._run(names[:turn])

    def finish(self) -> None:
        """Run the peers whose turn in the present round is after the subject."""
        self._run(self._after_subject)
        self._after_subject = []

    def _run(self, names: list[str]) -> None:
        for name in names:
            self.seconds[name].append(seconds_of(self.peers[name]))


def seconds_of(function: Function) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_in_turn(
    benchmark: BenchmarkFixture, functions: dict[str, Function], *, budget: float
) -> None:
    """Time all functions in interleaved rounds that take about `budget` seconds together.

    The times of the peers go to extra_info["peers"], those of `SUBJECT` to the benchmark's stats.
    There are at least MIN_ROUNDS rounds, however long that takes.
    """
    for function in functions.values():  # warm-up: caches, lazy initialisation, compilation
        function()
    one_round = sum(seconds_of(function) for function in functions.values())
    peers = PeersInTurn({name: f for name, f in functions.items() if name != SUBJECT})
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(budget / one_round)))
    benchmark.pedantic(functions[SUBJECT], setup=peers, rounds=rounds)
    peers.finish()
    benchmark.extra_info["peers"] = peers.seconds
