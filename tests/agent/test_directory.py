"""The contract of a directory, on every implementation."""

from __future__ import annotations

import threading

import pytest

from cache_agent.directory import Holding, InProcessDirectory


@pytest.fixture(params=[InProcessDirectory])
def directory(request):
    return request.param()


def test_a_source_nobody_admitted_has_no_revision(directory):
    assert directory.revision("src-1") == ""


def test_a_remembered_revision_is_found_and_may_be_corrected(directory):
    directory.remember("src-1", "rev-1")
    directory.remember("src-2", "rev-1")
    assert (directory.revision("src-1"), directory.revision("src-2")) == ("rev-1", "rev-1")
    directory.remember("src-1", "rev-2")
    assert (directory.revision("src-1"), directory.revision("src-2")) == ("rev-2", "rev-1")


def test_holders_are_ordered_and_one_per_node_and_tier(directory):
    assert directory.holders("src-1") == []
    directory.publish("src-1", Holding("b", "ssd", 5, 9))
    directory.publish("src-1", Holding("b", "dram", 1, 9))
    directory.publish("src-1", Holding("a", "dram", 2, 9))
    directory.publish("src-1", Holding("b", "dram", 3, 9))
    assert directory.holders("src-1") == [
        Holding("a", "dram", 2, 9),
        Holding("b", "dram", 3, 9),
        Holding("b", "ssd", 5, 9),
    ]
    assert directory.holders("src-2") == []


def test_what_is_withdrawn_is_gone_and_the_rest_stays(directory):
    directory.publish("src-1", Holding("a", "dram", 9, 9))
    directory.publish("src-1", Holding("a", "ssd", 9, 9))
    directory.withdraw("src-1", "a", "dram")
    assert directory.holders("src-1") == [Holding("a", "ssd", 9, 9)]
    directory.withdraw("src-1", "a", "ssd")
    assert directory.holders("src-1") == []


def test_withdrawing_what_was_never_published_is_no_error(directory):
    directory.withdraw("src-1", "a", "dram")
    directory.publish("src-1", Holding("a", "dram", 9, 9))
    directory.withdraw("src-1", "b", "dram")
    directory.withdraw("src-1", "a", "ssd")
    assert directory.holders("src-1") == [Holding("a", "dram", 9, 9)]


def test_many_threads_lose_nothing(directory, rounds):
    nodes = [f"node-{number}" for number in range(8)]
    failures = []

    def live(node: str) -> None:
        try:
            for done in range(rounds(200, 5000)):
                directory.publish("src-1", Holding(node, "dram", done, done))
                directory.withdraw("src-1", node, "dram")
                assert node not in {holding.node for holding in directory.holders("src-1")}
            directory.publish("src-1", Holding(node, "dram", 1, 1))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert [holding.node for holding in directory.holders("src-1")] == nodes
