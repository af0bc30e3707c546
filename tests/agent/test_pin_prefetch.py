"""Pins and prefetches, on real agents and from the command line."""

from __future__ import annotations

import json
import threading

from leased import FAKE, soon

from cache_agent.tiers.fake import FakeOrigin


def test_a_prefetched_model_is_resident_and_nobody_holds_it(agent, tmp_path, write_checkpoint, eventually):
    uri = f"file://{write_checkpoint(tmp_path / 'm')}"
    agent.client.prefetch(uri)
    eventually(lambda: [(m.state, m.leases) for m in agent.client.status().models] == [("ready", 0)])
    with agent.client.lease(uri) as lease:
        lease.wait_ready(soon())
        assert lease.tier == "dram"


def test_a_prefetch_that_fails_is_logged_and_leaves_nothing(agent, refused, eventually):
    agent.client.prefetch("file:///no/such/model")
    eventually(lambda: "prefetching file:///no/such/model failed" in agent.output())
    assert agent.client.status().models == []
    with refused("bad_uri"):
        agent.client.prefetch("nonsense")


def test_prefetches_do_not_starve_one_another(start_local_agent, checkpoint_files, eventually):
    """More than there are job threads, all waiting for their origin."""
    gate = threading.Event()
    origins = {}
    for number in range(30):
        uri = f"{FAKE}/{number}"
        origins[uri] = FakeOrigin(uri, checkpoint_files(seed=number), before_read=lambda *_: gate.wait(30))
    agent = start_local_agent(origins)
    for uri in origins:
        agent.client.prefetch(uri)
    gate.set()
    eventually(lambda: [(m.state, m.leases) for m in agent.agent.status()[2]] == [("ready", 0)] * 30, 30)


def test_a_pinned_model_stays_when_others_need_its_room(start_agent, tmp_path, write_checkpoint, refused, eventually):
    agent = start_agent("--dram", "5M")
    uris = [f"file://{write_checkpoint(tmp_path / str(seed), seed=seed)}" for seed in range(4)]
    with agent.client.lease(uris[0]) as lease:
        lease.wait_ready(soon())
    agent.client.pin(uris[0])
    for uri in uris[1:]:
        with agent.client.lease(uri) as lease:
            lease.wait_ready(soon())
        eventually(lambda: not any(model.leases for model in agent.client.status().models))
    pinned = {model.model: model.pinned for model in agent.client.status().models}
    assert pinned[uris[0]]
    assert not pinned[uris[3]]
    with refused("in_use") as error:
        agent.client.evict(uris[0])
    assert "pinned" in error.text
    agent.client.pin(uris[0], pinned=False)
    agent.client.evict(uris[0])


def test_the_commands(agent, tmp_path, write_checkpoint, glowplug_agent, eventually):
    model = str(write_checkpoint(tmp_path / "m"))
    socket = ["--socket", str(agent.socket)]
    assert glowplug_agent("pin", model, *socket).returncode == 1
    done = glowplug_agent("prefetch", model, *socket)
    assert (done.returncode, "on its way" in done.stdout) == (0, True)
    eventually(lambda: [m.state for m in agent.client.status().models] == ["ready"])
    assert "pinned" in glowplug_agent("pin", model, *socket).stdout
    assert "ready, pinned" in glowplug_agent("status", *socket).stdout
    assert json.loads(glowplug_agent("unpin", model, *socket, "--json").stdout)["bytes"] == 2 << 20
    evicted = json.loads(glowplug_agent("evict", model, "--ssd", *socket, "--json").stdout)
    assert evicted == {"bytes": 2 << 20, "stays": ""}
