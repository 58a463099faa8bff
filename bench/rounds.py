"""Candidates timed in turn, round by round, so that all meet the same machine.

pytest-benchmark times one function per test. Here that is attn_kd's; what pytest-benchmark calls
the setup of each of its rounds, untimed for it, runs the peers. The order of all of them is
shuffled from round to round, so that nobody always runs after the same predecessor. One clock
takes everybody's times, the wall's or a GPU's; what pytest-benchmark itself prints is time on the
wall.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from bench.devices import Clock, Function, WallClock

SUBJECT = "attn_kd"
YARDSTICK = "sdpa"
MIN_ROUNDS, MAX_ROUNDS = 3, 200
GOOD_ROUNDS = 9  # what is wanted of a long measurement, while that takes at most PATIENCE budgets
PATIENCE = 5
RARELY = 3  # a slow peer takes part in every third round
WALL = WallClock()


class PeersInTurn:
    """Runs the peers before and after each call of the subject; keeps all times, in seconds.

    The subject is called as what `timed` makes of it. A call of this object ends one round, with
    the peers whose turn is after the subject, and begins the next, with those before it. `finish`
    ends the last one. Peers named in `rare` run in every third round only.
    """

    def __init__(
        self, peers: dict[str, Function], rare: Collection[str] = (), clock: Clock = WALL
    ) -> None:
        self.peers = peers
        self.rare = rare
        self.clock = clock
        self.seconds: dict[str, list[float]] = {name: [] for name in peers}
        self._round = 0
        self._after_subject: list[str] = []
        self._random = random.Random(0)

    def __call__(self) -> None:
        self.finish()
        everybody = self._round % RARELY == 0
        self._round += 1
        names = [SUBJECT, *(name for name in self.peers if everybody or name not in self.rare)]
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
            self.seconds[name].append(self.clock.seconds(self.peers[name]))

    def timed(self, function: Function) -> Function:
        """The subject as a function that keeps its own times, by this object's clock."""
        seconds = self.seconds.setdefault(SUBJECT, [])
        return lambda: seconds.append(self.clock.seconds(function))


def measure_in_turn(
    benchmark: BenchmarkFixture,
    functions: Mapping[str, Function],
    *,
    budget: float,
    calls: int = 1,
    verify: Callable[[str, Any], None] | None = None,
    clock: Clock = WALL,
) -> None:
    """Time all functions in interleaved rounds that take about `budget` seconds together.

    The times go to extra_info["seconds"], and are of `calls` calls in a row. There are at least
    MIN_ROUNDS rounds, however long that takes. A peer that needs twice the time of the subject and
    more than a tenth of the budget takes part in every third.

    Args:
        calls: how often a function is called for one time: many where a call takes microseconds.
        verify: called with name and result of each function's first call; raises for a wrong one.
        clock: takes the times.
    """
    first = {name: _first_call(name, f, verify, clock) for name, f in functions.items()}
    repeated = {name: partial(_repeat, function, calls) for name, function in functions.items()}
    seconds = {name: _second_call(f, first[name] * calls, clock) for name, f in repeated.items()}
    rare = {
        name
        for name, needed in seconds.items()
        if needed > budget / 10 and needed > 2 * seconds[SUBJECT]
    }
    one_round = sum(s / (RARELY if name in rare else 1) for name, s in seconds.items())
    peers = PeersInTurn({name: f for name, f in repeated.items() if name != SUBJECT}, rare, clock)
    subject = peers.timed(repeated[SUBJECT])
    benchmark.pedantic(subject, setup=peers, rounds=rounds_within(budget, one_round))
    peers.finish()
    benchmark.extra_info.update(calls=calls, seconds=peers.seconds)


def rounds_within(budget: float, one_round: float) -> int:
    """As many rounds as fit into the budget; if those are few, up to GOOD_ROUNDS with patience."""
    with_patience = min(GOOD_ROUNDS, int(PATIENCE * budget / one_round))
    return min(MAX_ROUNDS, max(MIN_ROUNDS, with_patience, round(budget / one_round)))


def _first_call(
    name: str, function: Function, verify: Callable[[str, Any], None] | None, clock: Clock
) -> float:
    results: list[Any] = []
    seconds = clock.seconds(lambda: results.append(function()))
    if verify is not None:
        verify(name, results[0])
    return seconds


def _second_call(function: Function, first: float, clock: Clock) -> float:
    """A better estimate than the first call, which warms up; calls of seconds are not repeated."""
    return first if first > 2.0 else clock.seconds(function)


def _repeat(function: Function, calls: int) -> None:
    for _ in range(calls):
        function()
