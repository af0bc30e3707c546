"""Estimates: the arithmetic, and that they come true on a real agent."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leased import FAKE, soon

from cache_agent.policy.estimate import Estimate, Estimator, shared
from cache_agent.tiers.fake import FakeOrigin


def test_a_guess_has_no_confidence_and_counts_for_no_error():
    estimator = Estimator()
    guess = estimator.predict("origin", 1 << 30)
    assert guess.confidence == 0
    assert guess.seconds > 0
    estimator.learn("origin", 1 << 30, guess, 2.0)
    assert estimator.tiers["origin"].error == 0
    assert estimator.predict("origin", 1 << 30) == Estimate(pytest.approx(2.0), "origin", 0.5)


@given(st.lists(st.integers(1 << 20, 1 << 36), min_size=8, max_size=30), st.floats(1e6, 1e10))
def test_with_a_steady_rate_estimates_come_true(sizes, rate):
    estimator = Estimator()
    for size in sizes:
        estimator.learn("ssd", size, estimator.predict("ssd", size), size / rate)
    assert estimator.tiers["ssd"].error < 1e-6
    assert estimator.tiers["ssd"].rate == pytest.approx(rate)
    assert 0.85 < estimator.predict("ssd", 1).confidence < 1


def test_a_changed_rate_is_followed_and_lowers_the_confidence_meanwhile():
    estimator = Estimator()
    for _ in range(10):
        estimator.learn("ssd", 10**9, estimator.predict("ssd", 10**9), 1.0)
    before = estimator.predict("ssd", 10**9).confidence
    estimator.learn("ssd", 10**9, estimator.predict("ssd", 10**9), 4.0)
    assert estimator.predict("ssd", 10**9).confidence < before
    for _ in range(15):
        estimator.learn("ssd", 10**9, estimator.predict("ssd", 10**9), 4.0)
    assert estimator.predict("ssd", 10**9).seconds == pytest.approx(4.0, rel=0.05)


def test_small_loads_say_little_of_a_rate():
    estimator = Estimator()
    estimator.learn("origin", 10**10, estimator.predict("origin", 10**10), 10.0)
    estimator.learn("origin", 10**6, estimator.predict("origin", 10**6), 0.1)
    assert estimator.tiers["origin"].rate == pytest.approx(1e9, rel=0.05)


def test_loads_under_way_share_the_tier():
    assert shared(100, []) == 100
    assert shared(100, [30, 500]) == 230


def test_what_a_node_says_before_while_and_after(start_local_agent, checkpoint_files, eventually, tmp_path):
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if name == "model.safetensors" and start:
            assert gate.wait(30)

    origin = FakeOrigin(FAKE, checkpoint_files(), before_read=before_read)
    agent = start_local_agent({FAKE: origin}, ssd=tmp_path / "ssd")
    client = agent.client
    first = client.estimate(FAKE)
    assert (first.tier, first.confidence, first.bytes) == ("origin", 0.0, 2 << 20)
    with client.lease(FAKE) as lease:
        assert client.estimate(FAKE).tier == "origin"
        gate.set()
        lease.wait_ready(soon())
        there = client.estimate(FAKE)
        assert (there.seconds, there.tier, there.confidence) == (0.0, "dram", 1.0)
    eventually(lambda: client.status().ssd.images)
    eventually(lambda: agent.agent.status()[2][0].leases == 0)
    client.evict(FAKE)
    assert (client.estimate(FAKE).tier, client.estimate(FAKE).confidence) == ("ssd", 0.0)
    for _ in range(3):
        with client.lease(FAKE) as lease:
            lease.wait_ready(soon())
        eventually(lambda: agent.agent.status()[2][0].leases == 0)
        client.evict(FAKE)
    assert client.estimate(FAKE).confidence > 0
    tiers = {tier.tier: tier for tier in client.status().tiers}
    assert (tiers["origin"].loads, tiers["ssd"].loads) == (1, 3)
    assert tiers["ssd"].rate > 0
    assert tiers["ssd"].took > 0


def test_the_command(agent, tmp_path, write_checkpoint, glowplug_agent, refused):
    model = str(write_checkpoint(tmp_path / "m"))
    socket = ["--socket", str(agent.socket)]
    assert "from origin" in glowplug_agent("estimate", model, *socket).stdout
    assert json.loads(glowplug_agent("estimate", model, *socket, "--json").stdout)["bytes"] == 2 << 20
    assert glowplug_agent("load", model, *socket).returncode == 0
    assert "confidence 100%" in glowplug_agent("estimate", model, *socket).stdout
    assert "estimates off by" in glowplug_agent("status", *socket).stdout
    with refused("not_found"):
        agent.client.estimate("file:///no/such/model")
