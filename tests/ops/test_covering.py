"""Which cases are left of a parametrised test where each is slow."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from tests.ops.covering import covering


class Case:
    """What `covering` sees of a pytest item."""

    def __init__(self, test: str, **params: object) -> None:
        self.nodeid = f"{test}[{'-'.join(map(str, params.values()))}]"
        self.callspec = SimpleNamespace(params=params)


def grid(test: str, **values: range) -> list[Case]:
    """The product of all values, as parametrize makes it."""
    return [
        Case(test, **dict(zip(values, chosen, strict=True)))
        for chosen in itertools.product(*values.values())
    ]


def seen(cases: list[Case]) -> set[tuple[str, str, object]]:
    return {
        (case.nodeid.partition("[")[0], name, value)
        for case in cases
        for name, value in case.callspec.params.items()
    }


def test_every_value_of_every_parameter_is_left():
    cases = grid("test", a=range(4), b=range(3), c=range(2))
    chosen = covering(cases)
    assert seen(chosen) == seen(cases)
    assert len(chosen) == 4


def test_each_test_is_covered_by_its_own_cases():
    cases = [*grid("first", a=range(3)), *grid("second", a=range(3), b=range(2))]
    assert seen(covering(cases)) == seen(cases)


def test_values_that_come_in_pairs_are_all_left():
    cases = [Case("test", a=n, b=n) for n in range(5)]
    assert covering(cases) == cases
