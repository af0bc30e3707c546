"""The rule of a warm layer: against its parts spelled out, on clocks that begin anywhere."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.policy.keepalive import HoldDecision, LayerCost, keep
from runtime.layers.rule import Backoff, LayerRule

LANG = LayerCost("lang", 3.0, 300_000_000)  # β = 10 ρ

seconds = st.integers(0, 2000).map(float)
sizes = st.integers(10**6, 10**11)
prices = st.sampled_from([0.0, 0.5, 6.0, 60.0, 6000.0])
holds = st.none() | st.sampled_from([0.0, 5.0, math.inf])
# What happens to a layer, and how long after the thing before.
happenings = st.lists(
    st.tuples(
        seconds,
        st.one_of(
            st.just(("idle", None)),
            st.just(("used", None)),
            st.tuples(st.just("seconds"), st.integers(0, 100).map(float)),
            st.tuples(st.just("size"), sizes),
        ),
    ),
    max_size=60,
)


def happen(rule: LayerRule, what: tuple[str, Any], now: float) -> None:
    match what:
        case "idle", _:
            rule.idle(now)
        case "used", _:
            rule.used(now)
        case name, value:
            rule.measured(**{name: value})


@given(happenings, prices, holds, seconds)
def test_what_is_decided_follows_from_the_last_costs_and_idle_times(
    story: list[tuple[float, tuple[str, Any]]], rho: float, hold: float | None, later: float
) -> None:
    rule = LayerRule(LANG, rho, hold)
    cost, gaps, now = LANG, list[float](), 0.0
    since: float | None = None
    for after, what in story:
        now += after
        happen(rule, what, now)
        match what:
            case "idle", _:
                since = now if since is None else since
            case "used", _:
                gaps += [] if since is None else [now - since]
                since = None
            case "seconds", value:
                cost = cost._replace(seconds=value)
            case "size", value:
                cost = cost._replace(bytes=value)
        decided = keep(cost, gaps, rho) if hold is None else HoldDecision(cost, rho, hold)
        assert (rule.decision, rule.since) == (decided, since)
        assert rule.pays == (decided.hold > 0)
    now += later
    if since is None:
        assert (rule.age(now), rule.wanted(now), rule.expired(now)) == (None, rule.pays, False)
        assert rule.changes_in(now) == math.inf
    else:
        wanted = now - since <= rule.decision.hold
        assert (rule.age(now), rule.wanted(now), rule.expired(now)) == (now - since, wanted, not wanted)


@given(happenings, prices, holds)
def test_an_idle_layer_expires_once_and_when_it_was_said(
    story: list[tuple[float, tuple[str, Any]]], rho: float, hold: float | None
) -> None:
    rule, now = LayerRule(LANG, rho, hold), 0.0
    for after, what in story:
        now += after
        happen(rule, what, now)
    rule.idle(now)
    end = rule.changes_in(now)
    if rule.expired(now):
        assert end == math.inf
    elif end < math.inf:
        assert not rule.expired(now + end / 2)
        assert rule.expired(now + end + 0.001)
        assert rule.expired(now + end + 1e9)
    else:
        assert not rule.expired(now + 1e9)


@given(happenings, prices, holds, st.sampled_from([-(2.0**30), 2.0**20, 2.0**30]))
def test_no_answer_depends_on_where_the_clock_begins(
    story: list[tuple[float, tuple[str, Any]]], rho: float, hold: float | None, origin: float
) -> None:
    here, there, now = LayerRule(LANG, rho, hold), LayerRule(LANG, rho, hold), 0.0
    for after, what in story:
        now += after
        happen(here, what, now)
        happen(there, what, origin + now)
        assert (here.decision, here.age(now)) == (there.decision, there.age(origin + now))
        assert here.wanted(now) == there.wanted(origin + now)
    assert here.retry.due(now), "nothing has failed"
    assert there.retry.due(origin + now)
    assert here.retry.failed(now) == there.retry.failed(origin + now)
    assert not there.retry.due(origin + now)


def test_a_fixed_time_is_no_matter_of_price() -> None:
    rule = LayerRule(LANG, 0.0, 5.0)
    rule.idle(100.0)
    rule.measured(seconds=0.0, size=10**12)
    assert not rule.expired(105.0)
    assert rule.expired(105.1)
    assert rule.why == "held for 5 s"
    assert LayerRule(LANG, 60.0, hold=math.inf).why == "held without end"
    assert LayerRule(LANG, 0.0).why == "not held: memory has any price, starts have none"


def test_a_clock_that_steps_back_expires_nothing() -> None:
    rule = LayerRule(LANG, 60.0, 5.0)
    rule.idle(100.0)
    assert not rule.expired(40.0)
    assert rule.changes_in(40.0) == 5.0


@given(st.floats(0.1, 100.0), st.floats(1.0, 1000.0), st.integers(1, 30), st.integers(-(10**9), 10**9).map(float))
def test_pauses_grow_to_the_longest_and_begin_again(first: float, factor: float, count: int, now: float) -> None:
    most = first * factor
    backoff = Backoff(first, most)
    assert backoff.due(now)
    pauses = []
    for _ in range(count):
        pauses.append(backoff.failed(now))
        assert not backoff.due(now)
        assert not backoff.due(now + pauses[-1] / 2)
        now += pauses[-1]
        assert backoff.due(now)
    assert pauses[0] == first
    assert all(after == min(most, 2 * before) for before, after in pairwise(pauses))
    backoff.worked()
    assert backoff.due(now), "what worked is not held up"
    assert backoff.failed(now) == first


@pytest.mark.parametrize("cost", [LANG._replace(seconds=-1.0), LANG._replace(bytes=-1)])
def test_no_price_is_negative(cost: LayerCost) -> None:
    with pytest.raises(ValueError, match="price"):
        _ = LayerRule(cost, 60.0).decision
