"""The holding time of idle layers: the rule against trying every time, worked examples, and clocks that go back."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.policy.keepalive import GB, HISTORY, History, HoldDecision, LayerCost, beta, keep

LANG = LayerCost("lang", 3.0, int(0.3 * GB))  # β = 10 ρ

times = st.floats(0.0, 1e6)
layers = st.builds(LayerCost, st.just("lang"), st.floats(0.001, 1e3), st.integers(10**6, 10**12))
prices = st.floats(0.001, 1e4)


def cost(decision: HoldDecision, gaps: list[float]) -> float:
    """Return the cost of a decision in starts, by the formula itself and without the rule's partial sums."""
    limit, total = beta(decision.layer, decision.rho), 0.0
    for gap in gaps:
        total += min(gap, decision.hold) / limit + (not decision.wanted(gap))
    return total


@given(layers, st.lists(times, min_size=8, max_size=HISTORY), prices)
def test_no_other_time_would_have_been_cheaper(layer: LayerCost, gaps: list[float], rho: float) -> None:
    found = keep(layer, gaps, rho)
    least = cost(found, gaps)
    others = [0.0, *gaps, *(gap * factor for gap in gaps for factor in (0.999, 1.001)), beta(layer, rho)]
    assert least <= min(cost(found._replace(hold=other), gaps) for other in others) * (1 + 1e-9)
    assert found.hits == sum(gap <= found.hold for gap in gaps if found.hold) or found.hold == 0


@given(layers, st.lists(st.integers(0, 20).map(float), min_size=8, max_size=HISTORY), prices)
def test_of_equal_times_the_shortest(layer: LayerCost, gaps: list[float], rho: float) -> None:
    found = keep(layer, gaps, rho)
    shorter = [other for other in {0.0, *gaps} if other < found.hold]
    assert all(cost(found._replace(hold=other), gaps) > cost(found, gaps) * (1 - 1e-9) for other in shorter)


@given(layers, st.lists(times, max_size=HISTORY), st.lists(prices, min_size=2, max_size=6))
def test_a_higher_price_of_starts_never_holds_shorter(layer: LayerCost, gaps: list[float], rhos: list[float]) -> None:
    for cheap, dear in pairwise(sorted(rhos)):
        assert keep(layer, gaps, cheap).hold <= keep(layer, gaps, dear).hold * (1 + 1e-9)


@given(layers, st.lists(times, max_size=100), prices, st.floats(0.0, 1e6))
def test_decisions_are_consistent(layer: LayerCost, gaps: list[float], rho: float, idle: float) -> None:
    found = keep(layer, gaps, rho)
    assert found == keep(layer, gaps[-HISTORY:], rho)
    wait = found.changes_in(idle)
    assert wait >= 0
    if wait == math.inf:
        assert found.wanted(idle) == found.wanted(idle + 1e9)
    else:
        assert found.wanted(idle) == found.wanted(idle + wait / 2) or wait < 1e-6
    assert found.why.count(". ") == 0
    assert not found.why.endswith(".")


@pytest.mark.parametrize("known", range(8))
def test_little_known_costs_at_most_twice_the_best(known: int) -> None:
    found = keep(LANG, [1000.0] * known, 6.0)
    assert found.hold == beta(LANG, 6.0) == 60.0
    for gap in (1.0, 59.0, 60.0, 61.0, 1e9):
        assert cost(found, [gap]) <= 2 * min(gap / 60.0, 1.0)
    assert found.why == (
        "held for 60 s, little being known of its requests: so long 0.3 GB cost as much as a start of 3 s at "
        "6 GB·s a second"
    )


def test_eight_gaps() -> None:
    assert keep(LANG, [59.0] * 8, 6.0).hold == 59.0
    assert keep(LANG, [60.0] * 8, 6.0).hold == 0.0, "equal: not cheaper"
    assert keep(LANG, [61.0] * 8, 6.0).hold == 0.0
    assert keep(LANG, [500.0] * 8, 6.0).why == (
        "not held: for its last 8 idle times 0.3 GB would have cost more than starts of 3 s at 6 GB·s a second"
    )


def test_nights_are_not_held_through() -> None:
    """The module's example."""
    gaps = [gap for n in range(16) for gap in (60.0, 120.0, 90.0, 20_000.0 + 1000.0 * n)]
    day = keep(LANG, gaps, 60.0)
    assert (day.hold, day.hits, day.known) == (120.0, 48, 64)
    assert day.why == (
        "held for 2 min: of its last 64 idle times 48 were no longer, and 0.3 GB for 104 min cost less than 48 starts "
        "of 3 s at 60 GB·s a second"
    )
    assert keep(LANG, gaps, 3.0).hold == 0.0
    assert "not held: for its last 64 idle times" in keep(LANG, gaps, 3.0).why


def test_only_the_last_gaps_count() -> None:
    assert keep(LANG, [1000.0] * 500 + [5.0] * HISTORY, 6.0).hold == 5.0


@pytest.mark.parametrize(
    ("layer", "rho", "hold"),
    [
        (LayerCost("bare", 1.0, 0), 1.0, math.inf),
        (LayerCost("bare", 0.0, 0), 1.0, 0.0),
        (LayerCost("lang", 0.0, 10**9), 1.0, 0.0),
        (LayerCost("lang", 3.0, 10**9), 0.0, 0.0),
        (LayerCost("bare", 1.0, 0), 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("gaps", [[], [10.0], [10.0] * HISTORY])
def test_what_is_free(layer: LayerCost, rho: float, hold: float, gaps: list[float]) -> None:
    found = keep(layer, gaps, rho)
    assert found.hold == hold
    assert found.wanted(1e12) == (hold > 0)
    assert found.changes_in(0.0 if hold else 1.0) == math.inf
    assert found.why


@pytest.mark.parametrize(
    "layer", [LayerCost("lang", -1.0, 1), LayerCost("lang", math.nan, 1), LayerCost("lang", 1.0, -1)]
)
def test_no_price_is_negative(layer: LayerCost) -> None:
    with pytest.raises(ValueError, match="price"):
        keep(layer, [1.0], 1.0)
    with pytest.raises(ValueError, match="price"):
        keep(LANG, [1.0], -1.0)


def test_gaps_that_are_no_time() -> None:
    gaps = [5.0] * 9
    assert keep(LANG, [-5.0, math.nan, *gaps, math.inf], 6.0) == keep(LANG, gaps, 6.0)
    assert keep(LANG, [0.0] * 8, 6.0).hold == 0.0


def test_history_notes_idle_times() -> None:
    history = History()
    assert history.age(5.0) is None
    history.used(1.0)
    history.idle(10.0)
    history.idle(12.0)
    assert history.age(15.0) == 5.0
    history.used(17.0)
    history.used(18.0)
    assert (list(history.gaps), history.age(20.0)) == ([7.0], None)
    for start in range(100):
        history.idle(float(start))
        history.used(start + 0.5)
    assert list(history.gaps) == [0.5] * HISTORY


def test_a_clock_that_steps_back_gives_no_gap() -> None:
    history = History()
    history.idle(100.0)
    assert history.age(40.0) == 0.0
    history.used(40.0)
    assert (list(history.gaps), history.age(41.0)) == ([], None)
    history.idle(50.0)
    history.used(51.0)
    assert list(history.gaps) == [1.0]


def test_a_clock_that_steps_ahead_is_one_gap_of_many() -> None:
    gaps = [5.0] * (HISTORY - 1)
    assert keep(LANG, [*gaps, 1e9], 6.0).hold == keep(LANG, gaps, 6.0).hold == 5.0
