"""The contract of a directory, on every implementation."""

from __future__ import annotations

import threading

import pytest

from cache_agent.cluster.directory import Holding, InProcessDirectory, Node
from cache_agent.cluster.directory_redis import RedisDirectory


@pytest.fixture(params=["in process", "redis", "redis with the manifest's rights"])
def directory(request):
    if request.param == "in process":
        yield InProcessDirectory()
        return
    if request.param == "redis":
        directory = RedisDirectory(request.getfixturevalue("redis_url"), beat=0.05, ttl=5)
    else:
        url, password = request.getfixturevalue("redis_roles")("agent")
        directory = RedisDirectory(url, password_file=password, beat=0.05, ttl=5)
    yield directory
    directory.close()


def test_a_source_nobody_admitted_has_no_revision(directory):
    assert directory.revision("src-1") == ""


def test_a_remembered_revision_is_found_and_may_be_corrected(directory):
    directory.remember("src-1", "rev-1")
    directory.remember("src-2", "rev-1")
    assert (directory.revision("src-1"), directory.revision("src-2")) == ("rev-1", "rev-1")
    directory.remember("src-1", "rev-2")
    assert (directory.revision("src-1"), directory.revision("src-2")) == ("rev-2", "rev-1")


def test_who_stated_what(directory):
    """All nodes are right, or one of them lies."""
    assert directory.stated("src-1") == {}
    directory.heartbeat(Node("a"))
    directory.remember("src-1", "rev-1", "a")
    assert directory.stated("src-1") == {"a": "rev-1"}
    directory.remember("src-1", "rev-2", "a")
    assert directory.stated("src-1") == {"a": "rev-2"}
    assert directory.stated("src-2") == {}


def test_what_a_uri_was_last_seen_to_name(directory):
    directory.heartbeat(Node("a"))
    assert directory.validation("s3://m/a") == ("", 0.0)
    directory.validated("s3://m/a", "src-1", 1000.0)
    directory.validated("s3://m/b", "src-3", 1500.0)
    assert directory.validation("s3://m/a") == ("src-1", 1000.0)
    directory.validated("s3://m/a", "src-2", 2000.0)
    assert directory.validation("s3://m/a") == ("src-2", 2000.0)
    assert directory.validation("s3://m/b") == ("src-3", 1500.0)


def test_what_others_told_is_known(directory, eventually):
    eventually(lambda: directory.lost() == "")


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


def test_all_holdings_are_what_each_models_holders_are(directory):
    assert directory.holdings() == {}
    for model, node, tier in (("src-2", "a", "dram"), ("src-1", "b", "ssd"), ("src-1", "a", "dram")):
        directory.publish(model, Holding(node, tier, 9, 9))
    assert list(directory.holdings()) == ["src-1", "src-2"]
    assert directory.holdings() == {model: directory.holders(model) for model in ("src-1", "src-2")}
    directory.withdraw("src-2", "a", "dram")
    assert list(directory.holdings()) == ["src-1"]


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


# --- nodes, bandwidths, claims ----------------------------------------------------------------------------------------


def test_nodes_that_told_that_they_live(directory):
    assert directory.nodes() == []
    directory.heartbeat(Node("b", "10.0.0.2:8090", 100, 5))
    directory.heartbeat(Node("a"))
    directory.heartbeat(Node("b", "10.0.0.2:8090", 100, 50))
    assert directory.nodes() == [Node("a"), Node("b", "10.0.0.2:8090", 100, 50)]


def test_publishing_is_a_sign_of_life(directory):
    directory.publish("src-1", Holding("a", "dram", 1, 1))
    directory.measured("b", "origin", 1e9)
    assert [node.name for node in directory.nodes()] == ["a", "b"]


def test_bandwidths_are_the_last_ones_measured(directory):
    assert directory.bandwidth("a", "origin") == 0
    directory.measured("a", "origin", 1e9)
    directory.measured("a", "ssd", 3e9)
    directory.measured("a", "origin", 2e9)
    assert (directory.bandwidth("a", "origin"), directory.bandwidth("a", "ssd")) == (2e9, 3e9)
    assert directory.bandwidth("b", "origin") == 0


def test_a_claim_is_its_first_owners_until_it_is_released(directory):
    assert directory.claim("load:src-1", "a", 30) == "a"
    assert directory.claim("load:src-1", "b", 30) == "a"
    assert directory.claim("load:src-1", "a", 30) == "a", "its owner may renew it"
    assert not directory.release("load:src-1", "b")
    assert directory.release("load:src-1", "a")
    assert not directory.release("load:src-1", "a")
    assert directory.claim("load:src-1", "b", 30) == "b"
    assert directory.claim("load:src-2", "a", 30) == "a"


def test_a_claim_expires(directory, eventually):
    assert directory.claim("x", "a", 0.1) == "a"
    eventually(lambda: directory.claim("x", "b", 30) == "b")
    assert not directory.release("x", "a")


def test_only_one_of_many_gets_a_claim(directory):
    barrier, owners = threading.Barrier(16), []

    def ask(name: str) -> None:
        barrier.wait(30)
        owners.append(directory.claim("x", name, 30))

    threads = [threading.Thread(target=ask, args=(f"node-{number}",)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(owners) == 16
    assert len(set(owners)) == 1


def test_in_process_silent_nodes_age_out():
    now = [0.0]
    directory = InProcessDirectory(ttl=10, clock=lambda: now[0])
    directory.publish("src-1", Holding("a", "dram", 1, 1))
    directory.measured("a", "origin", 5.0)
    now[0] = 9.9
    directory.heartbeat(Node("b"))
    assert [node.name for node in directory.nodes()] == ["a", "b"]
    now[0] = 10.1
    assert directory.nodes() == [Node("b")]
    assert directory.holders("src-1") == []
    assert directory.bandwidth("a", "origin") == 0
