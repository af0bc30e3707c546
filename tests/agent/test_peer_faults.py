"""Real agents behind slow links, with a real Redis, and what befalls them in the middle of a transfer."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.links import Links
from leased import soon

RATE = 20e6  # bytes per second: a transfer of the model takes some seconds


def digest_of(lease):
    found = hashlib.sha256()
    for fd, size in zip(lease.segments, lease.manifest.segments, strict=True):
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as data:
            found.update(data)
    return found.hexdigest()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def uri(tmp_path_factory, write_checkpoint):
    """About 45 MB in 6 chunks."""
    place = write_checkpoint(tmp_path_factory.mktemp("m") / "m", seed=7, layers=4, hidden=800, vocabulary=3000)
    return f"file://{place}"


@pytest.fixture
def nodes(start_agent, redis_url, tmp_path):
    """`nodes(n)`: agents of one cluster; what they give each other passes links of RATE."""
    key = tmp_path / "key"
    key.write_text("only for these tests, only for these tests")
    with Links(RATE) as links:

        def start(count, *options):
            made = []
            for number in range(count):
                listen = free_port()
                made.append(
                    start_agent(
                        "--node", f"n{number}", "--redis-url", redis_url, "--cluster-key-file", str(key),
                        "--agent-listen", f"127.0.0.1:{listen}",
                        "--agent-address", f"127.0.0.1:{links.peer_door(f'n{number}', listen)}", *options,
                    )
                )  # fmt: skip
            return made

        yield start


def load(agent, uri):
    with agent.client.lease(uri, deadline=soon(60)) as lease:
        lease.wait_ready(soon(60))
        return lease.tier, digest_of(lease)


class Loading(threading.Thread):
    """A load that goes on while something happens."""

    def __init__(self, agent, uri):
        super().__init__()
        self.agent, self.uri = agent, uri
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = load(self.agent, self.uri)
        except Exception as error:
            self.error = error

    def under_way(self):
        """Some of it has come, and not all."""
        models = self.agent.client.status().models
        return bool(models) and 0 < models[0].done < models[0].bytes

    def end(self):
        self.join(90)
        if self.error is not None:
            raise self.error
        return self.result


def known(agent, eventually):
    """Waits until the others can know that the agent has the model, and what it is."""
    eventually(lambda: [model for model in agent.client.status().models if model.revision])


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_source_fails_in_the_middle(what, nodes, uri, eventually):
    source, receiver = nodes(2)
    right = load(source, uri)[1]
    known(source, eventually)
    eventually(lambda: load_comes_from_peer(receiver, uri), 20, what="the directory has told of the source")
    loading = Loading(receiver, uri)
    eventually(loading.under_way, 30)
    os.kill(source.pid, what)
    try:
        assert loading.end()[1] == right
    finally:
        if what == signal.SIGSTOP:
            os.kill(source.pid, signal.SIGCONT)
    assert "taking nothing from node n0" in receiver.output()


def load_comes_from_peer(agent, uri):
    return agent.client.estimate(uri).tier == "peer"


def test_the_receiver_is_killed_and_comes_back(nodes, uri, eventually, rounds):
    source, receiver = nodes(2)
    right = load(source, uri)[1]
    known(source, eventually)
    fds, threads = len(source.fds()), source.threads()
    for _ in range(rounds(1, 5)):
        eventually(lambda: load_comes_from_peer(receiver, uri), 20)
        loading = Loading(receiver, uri)
        eventually(loading.under_way, 30)
        receiver.kill()
        with pytest.raises(Exception, match=r"went away|answers at|broke off"):
            loading.end()
        receiver.start()
    assert load(receiver, uri)[1] == right
    # What the killed ones had open is closed; the agent's own pools may have grown by a few threads.
    eventually(lambda: len(source.fds()) <= fds + 6, 90)
    eventually(lambda: source.threads() <= threads + 8, 90)


def test_nodes_load_together_while_two_of_them_are_killed(nodes, uri, eventually):
    agents = nodes(4)
    loads = [Loading(agent, uri) for agent in agents]
    eventually(lambda: loads[0].under_way() or loads[0].result, 30)
    for victim in (0, 2):
        agents[victim].kill()
        agents[victim].process = None  # it is meant to be gone
    results = {loads[number].end()[1] for number in (1, 3)}
    for victim in (0, 2):
        loads[victim].join(60)
    assert len(results) == 1
