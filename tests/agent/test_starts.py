"""The ledgers of starts that an agent keeps: from the wire, in order, and no more of them than it says."""

from __future__ import annotations

import time

import pytest

from cache_agent.errors import AgentError
from cache_agent.journal.reports import KEPT, Starts
from cache_agent.ledger import Span
from cache_agent.wire.operations import Started

pytestmark = pytest.mark.clock  # of other processes


def told(number: int, *spans: Span, error: str = "") -> Started:
    return Started(f"start-{number}", "chat", "file:///m", "cold", list(spans), error)


def test_the_newest_comes_first_and_old_ones_go():
    starts = Starts()
    for number in range(KEPT + 3):
        starts.add(told(number))
    numbers = [int(start.start_id.removeprefix("start-")) for start in starts.recent()]
    assert numbers == list(range(KEPT + 2, 2, -1))


def test_a_second_report_takes_the_place_of_the_first():
    starts = Starts()
    first, later = Span("shim", "python", 1, 2), Span("worker", "first token", 5, 9)
    for report in (told(1, first), told(2), told(1, first, later)):
        starts.add(report)
    assert [(start.start_id, len(start.spans)) for start in starts.recent()] == [("start-2", 0), ("start-1", 2)]


def test_a_start_began_with_its_earliest_span():
    ago = time.monotonic_ns() - 90 * 10**9
    starts = Starts()
    late, first = Span("worker", "late", ago + 10**9, ago + 2 * 10**9), Span("shim", "python", ago, ago)
    start, new = starts.add(told(1, late, first))
    assert new
    assert not starts.add(told(1, late, first))[1]
    assert time.time() - start.began == pytest.approx(90, abs=30)


def test_over_the_wire(agent):
    span = Span("shim", "python", time.monotonic_ns(), time.monotonic_ns())
    assert agent.client.starts() == []
    agent.client.report_start(told(1, span))
    agent.client.report_start(told(2, error="the model is too large [no_capacity]"))
    second, first = agent.client.starts()
    assert (first.spans, first.function, first.kind, first.error) == ([span], "chat", "cold", "")
    assert second.error == "the model is too large [no_capacity]"


def test_a_ledger_without_end_is_refused(agent):
    with pytest.raises(AgentError):
        agent.client.report_start(told(1, *[Span("worker", "x", 1, 2)] * 257))
    assert agent.client.starts() == []
