"""Fewer cases where each is slow: every value of every parameter, but not every combination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pytest


def covering(items: Iterable[pytest.Function]) -> list[pytest.Function]:
    """Return cases of each test function in which every value of its parameters occurs.

    Greedily: the case with the most values not seen yet is next. So there are about as many cases
    as the parameter with the most values has.
    """
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    return [item for cases in tests.values() for item in _cover_one(cases)]


def _cover_one(cases: list[pytest.Function]) -> list[pytest.Function]:
    # By identity: parametrize hands one object to many cases, and not all can be hashed.
    values = {case: {(n, id(v)) for n, v in case.callspec.params.items()} for case in cases}
    missing = set().union(*values.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(values[case] & missing))
        chosen.append(best)
        missing -= values[best]
    return chosen
