"""The diagnosis of a start from its ledger, in sentences that can be acted upon."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.ledger import Span
from cache_agent.web.diagnosis import NodeFacts, attribute, diagnose

S = 10**9


def ledger(*rows: tuple[str, str, float, float]) -> list[Span]:
    return [Span(owner, name, int(start * S), int(end * S)) for owner, name, start, end in rows]


def cold(imports: float, weights: float, first: float = 0.1, waited: float = 0.0) -> list[Span]:
    """Return a start whose transfer begins with the imports."""
    ready = 0.6 + imports + weights
    return ledger(
        ("shim", "python", 0, 0.1),
        ("shim", "listen", 0.1, 0.11),
        ("worker", "python", 0.11, 0.3),
        ("worker", "lease", 0.3, 0.4),
        ("worker", "http", 0.3, 0.5),
        ("worker", "imports", 0.5, 0.5 + imports),
        ("agent", "transfer", 0.4, 0.5 + imports + weights),
        ("worker", "weights", 0.5 + imports, 0.5 + imports + weights),
        ("worker", "attach", 0.5 + imports + weights, ready),
        ("worker", "first token", ready + waited, ready + waited + first),
    )


@pytest.mark.parametrize(
    ("spans", "tier", "node", "bottleneck", "words"),
    [
        (cold(1, 9), "origin", NodeFacts(2_000_000_000), "transfer from origin", ["at 198 MB/s", "SSD tier is off"]),
        (cold(1, 9), "origin", NodeFacts(0, ssd=True), "transfer from origin", ["glowplug warm", "keeps it on SSD"]),
        (cold(1, 9), "ssd", NodeFacts(2_000_000_000, ssd=True), "transfer from ssd", ["huge pages", "--pin"]),
        (cold(1, 9), "ssd", NodeFacts(0, True, huge_pages=True), "transfer from ssd", ["--pin keeps it in memory"]),
        (cold(9, 1), "origin", NodeFacts(), "worker imports", ["warm layer"]),
        (cold(1, 0.1, first=7), "origin", NodeFacts(), "worker first token", ["that is the prompt"]),
        (ledger(("worker", "handler", 0, 5)), "", NodeFacts(), "worker handler", ["your handler.py"]),
        (ledger(("worker", "lease", 0, 5)), "", NodeFacts(), "worker lease", ["the origin was asked"]),
        (ledger(("worker", "engine, one request at a time: x", 0, 5)), "", NodeFacts(), None, ["builds the model"]),
        (ledger(("worker", "something new", 0, 5)), "", NodeFacts(), "worker something new", ["100% of 5.00 s"]),
    ],
)
def test_the_bottleneck_and_what_to_do(spans, tier, node, bottleneck, words):
    found = diagnose(spans, tier, node)
    assert bottleneck in (found.bottleneck, None)
    for word in (f"{found.share:.0%}", *words):
        assert word in found.sentence
    assert list(found.phases.values()) == sorted(found.phases.values(), reverse=True)


def test_weights_that_were_resident_are_no_transfer():
    spans = [span for span in cold(1, 9) if span.owner != "agent"]
    assert diagnose(spans, "dram", NodeFacts(10**9)).bottleneck == "worker weights"


def test_waiting_for_the_first_request_is_not_the_start():
    assert diagnose(cold(2, 1, waited=3600), "origin", NodeFacts()).seconds == pytest.approx(3.7)
    asked_early = [*cold(2, 1)[:-1], *ledger(("worker", "first token", 0.2, 3.8))]
    assert diagnose(asked_early, "origin", NodeFacts()).phases["worker first token"] == pytest.approx(0.2)


def test_a_gap_is_named():
    found = diagnose(ledger(("shim", "python", 0, 1), ("worker", "http", 4, 5)), "", NodeFacts())
    assert (found.bottleneck, found.share) == ("between the phases", 0.6)


@pytest.mark.parametrize("spans", [[], ledger(("agent", "transfer", 0, 1)), ledger(("shim", "restart", 1, 1))])
def test_nothing_to_say(spans):
    assert diagnose(spans, "origin", NodeFacts()) is None


intervals = st.tuples(st.integers(0, 50), st.integers(0, 50), st.sampled_from("abc")).map(
    lambda t: Span("worker", t[2], min(t[:2]), max(t[:2]))
)


@given(st.lists(intervals, max_size=12))
def test_the_parts_are_the_whole(spans):
    parts = attribute(spans)
    assert all(ns > 0 for ns in parts.values())
    assert sum(parts.values()) == max((s.end for s in spans), default=0) - min((s.start for s in spans), default=0)
