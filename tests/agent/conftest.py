"""What the tests of an agent's parts share: a clock that goes when it is told to."""

from __future__ import annotations

import pytest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """`clock()` is `clock.now`, seconds of any clock; 100 at first."""
    return Clock()
