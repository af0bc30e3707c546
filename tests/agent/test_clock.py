"""Clocks that are set, or wrong: leases, claims and beats do not notice; what has only a date is never too young."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import time
from datetime import UTC, datetime, timedelta

import pytest
from leased import FAKE, contents, ready, soon, tensors_of

from cache_agent.cluster.directory import CLOCKS_APART, Holding, InProcessDirectory, Node
from cache_agent.cluster.directory_redis import RedisDirectory
from cache_agent.errors import OriginUnavailable
from cache_agent.kube.witness import AnnouncedRemovals, ObjectMetadata
from cache_agent.residency.confirmed import Confirmed
from cache_agent.tiers.fake import FakeOrigin

YEAR = 365 * 86400.0


class Clock:
    """The time of day, as this process is told it: `ahead` seconds of the true one."""

    def __init__(self, monkeypatch) -> None:
        self.ahead = 0.0
        true = time.time
        monkeypatch.setattr(time, "time", lambda: true() + self.ahead)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def jumps(count: int) -> list[float]:
    source = random.Random(5)
    return [source.choice([-1, 1]) * source.choice([1.0, 3600.0, YEAR, 50 * YEAR]) for _ in range(count)]


# --- what does not notice ---------------------------------------------------------------------------------------------


def test_leases_loads_and_their_story_do_not_notice(start_local_agent, checkpoint_files, random_tensors, clock):
    agent = start_local_agent(revalidate=0.0)
    for number, jump in enumerate(jumps(6)):
        uri = f"fake://m{number}"

        def read(name: str, start: int, size: int, jump=jump) -> None:
            clock.ahead = jump if start else 0.0

        agent.origins[uri] = FakeOrigin(uri, checkpoint_files(seed=number), before_read=read)
        with ready(agent, uri) as lease, ready(agent, uri) as other:
            assert tensors_of(lease) == tensors_of(other) == contents(random_tensors(number))
            assert all(0 <= span.end - span.start < 60e9 for span in lease.spans)
            estimate = agent.client.estimate(uri)
            assert (estimate.seconds, estimate.confidence) == (0.0, 1.0)
        models = agent.client.status().models
        assert all(0 <= model.idle_seconds < 60 and 0 <= model.age_seconds < 60 for model in models)
    tiers = agent.client.status().tiers
    assert all(0 <= tier.took < 60 for tier in tiers)


@pytest.mark.parametrize("kind", ["in process", "redis"])
def test_nodes_claims_and_holdings_do_not_notice(kind, clock, request, eventually):
    with contextlib.ExitStack() as stack:
        if kind == "redis":
            url = request.getfixturevalue("redis_url")
            first, second = (RedisDirectory(url, beat=0.3, ttl=10.0) for _ in range(2))
        else:
            first = second = InProcessDirectory()
        for directory in {id(first): first, id(second): second}.values():
            stack.callback(directory.close)
        first.heartbeat(Node("a"))
        second.heartbeat(Node("b"))
        first.publish("src-1", Holding("a", "dram", 9, 9))
        assert first.claim("place", "a", 60.0) == "a"
        for jump in jumps(3):
            clock.ahead = jump
            eventually(lambda: [node.name for node in second.nodes()] == ["a", "b"])
            assert second.holders("src-1") == [Holding("a", "dram", 9, 9)]
            assert second.claim("place", "b", 60.0) == "a", "it lasts as long as it was meant to"
            assert first.claim("place", "a", 60.0) == "a", "and can be renewed"
        assert first.release("place", "a")
        assert second.claim("place", "b", 60.0) == "b"


def test_a_function_is_never_given_more_grace_than_its_pod_has():
    true = datetime(2030, 1, 1, tzinfo=UTC)
    ends = true + timedelta(seconds=20)
    for ahead in [0.0, *jumps(10)]:
        pod = ObjectMetadata(
            name="p", namespace="n", uid="u", deletionTimestamp=ends.isoformat(), deletionGracePeriodSeconds=30.0
        )
        removal = AnnouncedRemovals().changed(pod, true + timedelta(seconds=ahead))
        assert removal is not None
        assert 0.0 <= removal.grace <= 30.0


# --- what has only a date ---------------------------------------------------------------------------------------------


class Ticking:
    """Two clocks that the test turns by hand."""

    def __init__(self) -> None:
        self.day = 1000 * 86400.0
        self.up = 0.0
        self.confirmed = Confirmed(lambda: self.day, lambda: self.up)


def test_what_this_agent_heard_itself_ages_with_the_clock_that_does_not_jump():
    clocks = Ticking()
    clocks.confirmed.say("s3://m", "src-1")
    told = clocks.day
    for jump in (YEAR, -YEAR, 0.0):
        clocks.up += 7.0
        clocks.day = told + jump
        assert clocks.confirmed.age("s3://m", "src-1", told) == clocks.up
    assert clocks.confirmed.age("s3://m", "src-2", clocks.day - 5.0) == 5.0, "that it was another is another matter"


def test_what_was_never_heard_is_not_as_old_as_the_machine():
    clocks = Ticking()
    clocks.up = 5.0
    assert clocks.confirmed.age("s3://m", "", clocks.day - YEAR) == YEAR


@pytest.mark.parametrize(
    ("since", "age"),
    [(-YEAR, YEAR), (-5.0, 5.0), (0.0, 0.0), (CLOCKS_APART - 1, 0.0), (CLOCKS_APART + 1, math.inf), (YEAR, math.inf)],
)
def test_what_others_remember_is_as_old_as_its_date_and_a_date_to_come_says_nothing(since, age):
    clocks = Ticking()
    assert clocks.confirmed.age("s3://m", "src-1", clocks.day + since) == age


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("cache_agent.residency.confirmed._MOST", 3)
    clocks = Ticking()
    for number in range(5):
        clocks.confirmed.say(f"s3://{number}", "src-1")
    assert list(clocks.confirmed._seen) == ["s3://2", "s3://3", "s3://4"]


class Down(FakeOrigin):
    def files(self):
        raise OriginUnavailable("the store is down")


@pytest.mark.parametrize("jump", [-50.0, YEAR], ids=["back", "forward"])
def test_a_clock_that_is_set_makes_no_alias_younger_or_older(
    jump, start_local_agent, checkpoint_files, tmp_path, clock, eventually
):
    """The agent asked a moment ago, whatever the date says now."""
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files())}, ssd=tmp_path / "ssd", stale=60.0)
    ready(agent, FAKE).close()
    eventually(lambda: agent.client.status().ssd.images)
    eventually(lambda: not agent.agent.status()[2][0].leases)
    agent.client.evict(FAKE)
    agent.origins[FAKE] = Down(FAKE, {})
    clock.ahead = jump
    with ready(agent, FAKE) as lease:
        assert lease.tier == "ssd"
        (seconds,) = [found[1] for span in lease.spans if (found := re.search(r"could ask for (\d+) s", span.name))]
        assert int(seconds) < 60


@pytest.mark.parametrize(
    ("since", "stale", "served"),
    [(-30.0, 100.0, True), (-200.0, 100.0, False), (200.0, 100.0, False), (-1.0, 0.0, False)],
)
def test_after_a_restart_an_image_is_as_old_as_its_date(
    since, stale, served, start_local_agent, checkpoint_files, tmp_path, refused, eventually
):
    first = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files())}, ssd=tmp_path / "ssd")
    ready(first, FAKE).close()
    eventually(lambda: first.client.status().ssd.images)
    first.close()
    (description,) = (tmp_path / "ssd" / "images").glob("*/description")
    os.utime(description, (time.time() + since,) * 2)
    second = start_local_agent({FAKE: Down(FAKE, {})}, ssd=tmp_path / "ssd", stale=stale)
    if served:
        with ready(second, FAKE) as lease:
            assert lease.tier == "ssd"
    else:
        with refused("origin_unavailable"), second.client.lease(FAKE, deadline=soon()):
            pass


def test_a_node_whose_clock_is_ahead_does_not_have_the_last_word(redis_url, eventually):
    ahead, right, reader = (RedisDirectory(redis_url, beat=0.3, ttl=10.0) for _ in range(3))
    try:
        ahead.heartbeat(Node("ahead"))
        right.heartbeat(Node("right"))
        ahead.validated("s3://m", "src-old", 1000.0 + YEAR)
        right.validated("s3://m", "src-new", 1000.0)
        eventually(lambda: reader.validation("s3://m")[0] == "src-old")
        eventually(lambda: reader.validation("s3://m", 1001.0) == ("src-new", 1000.0))
        ahead.validated("s3://m", "src-old", 990.0)  # its clock was set right
        eventually(lambda: reader.validation("s3://m") == ("src-new", 1000.0))
    finally:
        for directory in (ahead, right, reader):
            directory.close()
