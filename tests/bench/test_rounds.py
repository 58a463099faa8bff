"""Candidates take turns, and everybody's turn changes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest

from bench.rounds import GOOD_ROUNDS, MAX_ROUNDS, MIN_ROUNDS, SUBJECT, PeersInTurn, rounds_within

ROUNDS = 60
NAMES = (SUBJECT, "sdpa", "eager")


@pytest.fixture(scope="module")
def rounds() -> list[list[str]]:
    """Who ran in each round, as pytest-benchmark drives it: the setup, then the subject."""
    log: list[str] = []
    peers = PeersInTurn({name: partial(log.append, name) for name in NAMES if name != SUBJECT})
    for _ in range(ROUNDS):
        peers()
        log.append(SUBJECT)
    peers.finish()
    assert {len(seconds) for seconds in peers.seconds.values()} == {ROUNDS}
    return [log[start : start + len(NAMES)] for start in range(0, len(log), len(NAMES))]


def test_everybody_runs_once_a_round(rounds):
    assert len(rounds) == ROUNDS
    assert all(sorted(names) == sorted(NAMES) for names in rounds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turn", range(len(NAMES)))
def test_everybody_has_every_turn_about_equally_often(rounds, name, turn):
    share = sum(names[turn] == name for names in rounds) / ROUNDS
    assert 0.15 < share < 0.55


@pytest.mark.parametrize("name", NAMES)
def test_everybody_follows_everybody(rounds, name):
    in_order = [each for names in rounds for each in names]
    before = {a for a, b in pairwise(in_order) if b == name}
    assert before >= set(NAMES) - {name}


def test_a_rare_peer_runs_in_every_third_round():
    log: list[str] = []
    peers = PeersInTurn({name: partial(log.append, name) for name in NAMES[1:]}, rare={"eager"})
    for _ in range(7):
        peers()
    peers.finish()
    assert (log.count("sdpa"), log.count("eager")) == (7, 3)
    assert [len(peers.seconds[name]) for name in ("sdpa", "eager")] == [7, 3]


@pytest.mark.parametrize(
    ("one_round", "expected"),
    [
        (1e-3, MAX_ROUNDS),
        (0.2, 30),  # as many as fit into the budget
        (2.0, GOOD_ROUNDS),  # with patience
        (5.0, 6),  # patience is five budgets
        (100.0, MIN_ROUNDS),
    ],
)
def test_rounds_follow_the_budget(one_round, expected):
    assert rounds_within(6.0, one_round) == expected
