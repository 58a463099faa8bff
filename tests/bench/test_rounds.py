"""Candidates take turns, and everybody's turn changes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest

from bench.rounds import SUBJECT, PeersInTurn

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
