"""The node where a model starts soonest: worked examples, and properties that hold for any nodes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.policy import placement
from cache_agent.policy.placement import PlacementNode, RunningModel, Tier, View

GB = 10**9
MODEL = 4 * GB


def seconds(node: PlacementNode, size: int = MODEL) -> float:
    return placement.decide(size, node).seconds


def test_resident_is_attached() -> None:
    found = placement.decide(MODEL, PlacementNode("n", tiers=(Tier("dram", MODEL),), queue=9.0))
    assert (found.way, found.seconds, found.why) == ("load", 0.05, "all of it is in memory")


def test_tiers_add_up() -> None:
    """3 GB are in memory, the fourth comes from the SSD; ServerlessLLM would read all four."""
    node = PlacementNode("n", tiers=(Tier("ssd", MODEL, 2.0 * GB), Tier("dram", 3 * GB)), attach=0.0)
    found = placement.decide(MODEL, node)
    assert found.seconds == pytest.approx(0.5)
    assert (found.tier, found.measured) == ("ssd", 1.0)
    assert found.why == "1000 MB from ssd in 0.50 s"


def test_queue_delays_those_who_load() -> None:
    ssd = (Tier("ssd", MODEL, 1.0 * GB),)
    assert seconds(PlacementNode("n", tiers=ssd, queue=3.0)) == pytest.approx(3.0 + 4.0 + 0.05)


def test_what_nobody_measured_is_said() -> None:
    found = placement.decide(MODEL, PlacementNode("n", tiers=(Tier("ssd", 2 * GB, 1.0 * GB),)))
    assert found.seconds == pytest.approx(2.0 + 2 * GB / placement.ASSUMED["origin"] + 0.05)
    assert found.measured == pytest.approx(2.0 / 10.0)


@pytest.mark.parametrize(
    ("running", "way", "expected"),
    [
        ((RunningModel(5.0),), "wait", 5.05),
        ((RunningModel(5.0, 0.5),), "move", 0.55),
        ((RunningModel(0.2, 0.5),), "wait", 0.25),
        ((RunningModel(5.0, 4.0), RunningModel(1.0)), "wait", 1.05),
        ((), "none", math.inf),
    ],
)
def test_load_wait_or_move(running: tuple[RunningModel, ...], way: str, expected: float) -> None:
    node = PlacementNode("n", tiers=(Tier("dram", MODEL),), places=0, running=running)
    found = placement.decide(MODEL, node)
    assert (found.way, found.seconds) == (way, pytest.approx(expected))


def test_moving_pays_only_where_loading_elsewhere_is_slower() -> None:
    """ServerlessLLM's figure: the node with the model in memory is busy, a free one has it on disk only."""
    busy = PlacementNode("busy", tiers=(Tier("dram", MODEL),), places=0, running=(RunningModel(30.0, 1.0),))
    assert (
        placement.rank(View(MODEL, (busy, PlacementNode("free", tiers=(Tier("ssd", MODEL, 1.0 * GB),)))))[0].node
        == "busy"
    )
    assert (
        placement.rank(View(MODEL, (busy, PlacementNode("free", tiers=(Tier("ssd", MODEL, 8.0 * GB),)))))[0].node
        == "free"
    )


def test_a_dead_agents_tiers_count_for_nothing() -> None:
    found = placement.decide(MODEL, PlacementNode("n", alive=False, tiers=(Tier("dram", MODEL),), origin=1.0 * GB))
    assert found.seconds == pytest.approx(4.05)
    assert found.why.startswith("no agent is known there")


def test_scores_leave_other_reasons_their_say() -> None:
    """Nodes that are about equal get equal scores; a node that is far better gets the whole range."""

    def scores(*seconds: float) -> list[int]:
        found = [placement.PlacementDecision(str(n), "load", s, "", 1.0, "") for n, s in enumerate(seconds)]
        return list(placement.scores(found, [str(n) for n in range(len(seconds))]).values())

    assert scores(5.0, 5.0, 5.0) == [0, 0, 0]
    assert scores(0.01, 0.09) == [0, 0], "nobody notices"
    assert scores(5.0, 5.3) == [0, 0]
    assert scores(0.05, 1.0, 20.0) == [10, 6, 0]
    assert scores(1.0, 4.0) == [10, 0]
    assert scores(math.inf, math.inf) == [0, 0]
    assert scores() == []


def test_the_unknown_come_last() -> None:
    found = [
        placement.PlacementDecision("a", "load", 1.0, "", 1.0, ""),
        placement.PlacementDecision("b", "load", 9.0, "", 1.0, ""),
    ]
    assert placement.scores(found, ["x", "a", "b"]) == {"x": 0, "a": 10, "b": 0}
    assert placement.scores(found, ["x"]) == {"x": 0}
    view = placement.covering(View(MODEL, (PlacementNode("a", tiers=(Tier("dram", MODEL),)),)), ["x", "a"])
    assert placement.scores(placement.rank(view), ["x", "a"]) == {"x": 0, "a": 10}


def test_view_of_a_directory() -> None:
    holdings = [("n1", "dram", 5, 10), ("n1", "ssd", 10, 10), ("gone", "ssd", 10, 10)]
    view = placement.from_holdings(10, holdings, {"n1", "n2"}, {("n1", "ssd"): 3.0, ("n2", "origin"): 2.0})
    assert view.nodes == (
        PlacementNode("gone", alive=False, tiers=(Tier("ssd", 10),)),
        PlacementNode("n1", tiers=(Tier("dram", 5), Tier("ssd", 10, 3.0))),
        PlacementNode("n2", origin=2.0),
    )


names = st.sampled_from(["dram", "ssd", "peer", "origin", "another"])
sizes = st.integers(0, 1 << 40)
finite = st.floats(0, 1e9)
tiers = st.builds(Tier, names, sizes, st.one_of(st.just(0.0), st.floats(1e3, 1e12)))
running = st.builds(RunningModel, finite, st.one_of(st.none(), finite))
node = st.builds(
    PlacementNode,
    name=st.sampled_from("abcdefgh"),
    alive=st.booleans(),
    tiers=st.lists(tiers, max_size=4).map(tuple),
    queue=finite,
    attach=finite,
    places=st.integers(-1, 2),
    running=st.lists(running, max_size=3).map(tuple),
)
views = st.builds(View, sizes, st.lists(node, max_size=8, unique_by=lambda n: n.name).map(tuple))


@given(views, st.lists(st.sampled_from("abcdefghxyz"), unique=True))
def test_any_view_has_an_answer(view: View, asked: list[str]) -> None:
    found = placement.rank(view)
    assert [decision.seconds for decision in found] == sorted(decision.seconds for decision in found)
    for decision in found:
        assert decision.seconds >= 0
        assert 0.0 <= decision.measured <= 1.0 + 1e-9
        assert decision.why
    scores = placement.scores(found, asked)
    assert list(scores) == asked
    assert all(isinstance(score, int) and 0 <= score <= placement.TOP for score in scores.values())
    by_time = {decision.node: decision.seconds for decision in found}
    known = [name for name in asked if name in by_time]
    assert all(scores[a] >= scores[b] for a in known for b in known if by_time[a] <= by_time[b])


@given(sizes, node)
def test_more_of_a_model_is_never_slower(size: int, one: PlacementNode) -> None:
    resident = PlacementNode(
        one.name, one.alive, (*one.tiers, Tier("dram", size)), one.queue, one.attach, one.places, one.running
    )
    assert placement.decide(size, resident).seconds <= placement.decide(size, one).seconds * (1 + 1e-9)
