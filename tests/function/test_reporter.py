"""Reports of hand-offs: the agent has each once, also after it was away or busy, or when one is repeated."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cache_agent.client import handoff as reports
from cache_agent.client.cache_client import CacheClient
from cache_agent.wire.requests import MAX_ITEMS, HandoffOutcome
from runtime.handoff import reporter as reporters
from runtime.handoff.reporter import Reporter

SOON = 120.0


def handed(number: int) -> HandoffOutcome:
    return HandoffOutcome("chat", f"req-{number}", "worker-1", "worker-2", 12, 0.025, "kv", "moved")


@pytest.fixture
def reporter(agent: Any) -> Iterator[Reporter]:
    client = CacheClient(agent.socket, timeout=0.5)
    made = Reporter(lambda items: reports.report(client, items))
    yield made
    made.close(time.monotonic())


def known(agent: Any) -> list[str]:
    return [record.id for record in reversed(agent.client.status().handoffs)]


def test_an_agent_that_was_away_hears_it_when_it_is_back(
    agent: Any, reporter: Reporter, eventually: Callable[..., Any]
) -> None:
    agent.stop()
    for number in range(3):
        reporter.report(handed(number))
    agent.start()
    eventually(lambda: known(agent) == ["req-0", "req-1", "req-2"], SOON)


def test_the_end_waits_for_an_agent_that_stands_still(agent: Any, reporter: Reporter) -> None:
    """The agent's socket accepts a report, and no answer comes: the report is repeated, and counts once."""
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        reporter.report(handed(1))
        end = threading.Thread(target=reporter.close, args=(time.monotonic() + SOON,))
        end.start()
        end.join(2.0)
        assert end.is_alive()
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    end.join(SOON)
    assert not end.is_alive()
    assert known(agent) == ["req-1"]


def test_the_end_does_not_wait_for_ever(agent: Any, reporter: Reporter) -> None:
    agent.stop()
    reporter.report(handed(1))
    reporter.close(time.monotonic() + 0.2)
    agent.start()
    reporter.close(time.monotonic() + SOON)
    assert known(agent) == []


def test_what_is_told_twice_counts_once(agent: Any) -> None:
    for _ in range(2):
        reports.report(agent.client, [handed(1), handed(2)])
    assert known(agent) == ["req-1", "req-2"]


def test_of_too_many_the_oldest_are_dropped(agent: Any, reporter: Reporter) -> None:
    agent.stop()
    for number in range(reporters._MOST + 5):
        reporter.report(handed(number))
    agent.start()
    reporter.close(time.monotonic() + SOON)
    assert known(agent)[-1] == f"req-{reporters._MOST + 4}"
    assert reporters._MOST > MAX_ITEMS
    events = [event.text for event in agent.client.events() if event.kind == "handoff"]
    assert not [text for text in events if text.startswith("req-0:")]
