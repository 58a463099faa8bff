"""Changes to a model that several distillers may need at once, undone by the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Change(Protocol):
    """A change that was made to something."""

    def undo(self) -> None:
        """Put it back as it was."""
        ...


C = TypeVar("C", bound=Change)


@dataclass
class _Loan(Generic[C]):
    subject: object  # kept alive, so that its id stays its own
    change: C
    holders: int = 1


class Loans(Generic[C]):
    """Counts who relies on a change of some object; the first one makes it, the last undoes it."""

    def __init__(self) -> None:
        self._loans: dict[int, _Loan[C]] = {}
        self._lock = threading.Lock()

    def take(self, subject: object, make: Callable[[], C]) -> C:
        """Rely on the change of `subject` that `make` makes; return the change in force."""
        with self._lock:
            loan = self._loans.get(id(subject))
            if loan is None:
                loan = self._loans[id(subject)] = _Loan(subject, make())
            else:
                loan.holders += 1
            return loan.change

    def give_back(self, subject: object) -> None:
        """Rely on it no longer."""
        with self._lock:
            loan = self._loans[id(subject)]
            loan.holders -= 1
            if loan.holders == 0:
                del self._loans[id(subject)]
                loan.change.undo()
