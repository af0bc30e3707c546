"""What an agent tells of the other nodes: what its directory has, over the wire as well."""

from __future__ import annotations

import time

from cache_agent.cluster.directory import Holding, InProcessDirectory, Node
from cache_agent.residency import report
from cache_agent.wire.operations import ClusterReply, HoldingStatus, NodeStatus


def test_nodes_with_their_rates_and_all_that_they_hold():
    directory = InProcessDirectory()
    directory.heartbeat(Node("b", "10.0.0.2:9480", 64, 9))
    directory.publish("rev-1", Holding("a", "ssd", 3, 9))
    directory.publish("rev-1", Holding("b", "dram", 9, 9))
    directory.measured("b", "origin", 2e8)
    assert report.cluster(directory) == ClusterReply(
        [NodeStatus("a", "", 0, 0, {}), NodeStatus("b", "10.0.0.2:9480", 64, 9, {"origin": 2e8})],
        [HoldingStatus("rev-1", "a", "ssd", 3, 9), HoldingStatus("rev-1", "b", "dram", 9, 9)],
    )


def test_over_the_wire(start_agent, tmp_path, write_checkpoint, eventually):
    agent = start_agent("--node", "node-a")
    model = f"file://{write_checkpoint(tmp_path / 'm', seed=1)}"
    assert agent.client.cluster().holdings == []
    with agent.client.lease(model) as lease:
        lease.wait_ready(time.monotonic() + 30)
    held = eventually(lambda: agent.client.cluster().holdings, what="the directory has it")
    assert [(each.node, each.tier, each.done) for each in held] == [("node-a", "dram", each.total) for each in held]
    assert [node.name for node in agent.client.cluster().nodes] == ["node-a"]
