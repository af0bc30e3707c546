"""The number of parallel reads, against links that are simulated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.loading.parallelism import HOLD, WINDOW, Parallelism

STEP = 0.05


def run(control: Parallelism, link: Callable[[int], float], seconds: float, start: float = 0.0, total: int = 0):
    """Reads over `link(readers) -> bytes/s`; (bytes, the limits of all steps)."""
    limits, now = [], start
    while now < start + seconds:
        limits.append(control.observe(total, now))
        total += int(link(control.limit) * STEP)
        now += STEP
    return total, limits


@given(each=st.floats(1e6, 1e9), full=st.floats(1e6, 5e9), most=st.integers(1, 64))
def test_it_comes_close_to_what_the_link_gives(each, full, most):
    control = Parallelism(most)
    _, limits = run(control, lambda n: min(n * each, full), 10)
    best = min(most * each, full)
    assert min(limits[-1] * each, full) >= best / 1.1 - 1
    assert all(1 <= limit <= most for limit in limits)


@given(each=st.floats(1e6, 1e9), needed=st.integers(1, 16))
def test_it_does_not_open_many_more_connections_than_pay(each, needed):
    control = Parallelism(64)
    _, limits = run(control, lambda n: min(n, needed) * each, 5)
    assert limits[-1] <= max(4, 2 * needed)


def test_connections_that_hurt_are_given_back():
    control = Parallelism(64)
    _, limits = run(control, lambda n: 8e8 if n <= 8 else 8e8 / n, 5)
    assert limits[-1] in (4, 8)


def test_it_looks_again_when_the_link_has_grown():
    control = Parallelism(32)
    total, limits = run(control, lambda n: min(n * 1e8, 4e8), 2)
    assert limits[-1] == 4
    _, limits = run(control, lambda n: n * 1e8, 3 * HOLD * WINDOW, 2, total)
    assert limits[-1] == 32


def test_trouble_halves_it_down_to_one():
    control = Parallelism(32, 8)
    assert [control.trouble() for _ in range(5)] == [4, 2, 1, 1, 1]
    _, limits = run(control, lambda n: n * 1e8, 1)
    assert set(limits) == {1}, "it waits before it tries more again"
    _, limits = run(control, lambda n: n * 1e8, 3 * HOLD * WINDOW, 1)
    assert limits[-1] == 32


@pytest.mark.parametrize(("most", "limit"), [(1, 1), (3, 3), (100, 4), (0, 1)])
def test_where_it_starts(most, limit):
    assert Parallelism(most).limit == limit


def test_a_silent_link_is_no_reason_for_more():
    control = Parallelism(64)
    _, limits = run(control, lambda n: 0.0, 5)
    assert set(limits) == {4}
