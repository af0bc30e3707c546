"""Clients with a lease that do not read lose connection and lease in time; other clients notice nothing."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from leased import contents, large_tensors, ready, tensors_of

from cache_agent.client.cache_client import CacheClient
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire import link
from cache_agent.wire.channel import Channel
from cache_agent.wire.messages import Identity, LeaseRequest

URI = "s3://models/m"
TOKEN = "a secret of these tests"
GIVEN_UP = 0.5  # seconds


@pytest.fixture(scope="module")
def tensors():
    return large_tensors(2)


@pytest.fixture
def agent(start_local_agent, checkpoint_files, tensors, tmp_path, monkeypatch):
    """Give an agent of little patience, with more bytes than any socket takes."""
    for kind in (Channel, link.Link):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "send_timeout", GIVEN_UP)
    (tmp_path / "token").write_text(TOKEN)
    return start_local_agent({URI: FakeOrigin(URI, checkpoint_files(tensors))}, token_file=tmp_path / "token")


def client(agent, transport: str) -> CacheClient:
    path = agent.socket if transport == "unix" else f"tcp://{agent.address}"
    return CacheClient(path, name=transport, identity=lambda: Identity("token", TOKEN), timeout=30)


def narrow(agent) -> Channel:
    """Open a connection over TCP with small buffers."""
    channel = client(agent, "tcp").connect()
    channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    return channel


class Others:
    """A function of the same node that goes on working."""

    def __init__(self, agent, tensors) -> None:
        self.client = client(agent, "unix")
        self._tensors = contents(tensors)

    def check(self) -> None:
        with ready(self, URI) as lease:
            assert tensors_of(lease) == self._tensors


def free(agent) -> bool:
    return [model.leases for model in agent.agent.status()[2]] == [0] and not agent.server._snapshot()


def test_over_tcp_a_function_that_takes_none_of_its_bytes(agent, tensors, eventually):
    others = Others(agent, tensors)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(narrow(agent)).send(LeaseRequest(URI))
        eventually(lambda: agent.agent.status()[2])
        others.check()
        eventually(lambda: free(agent), 30, "the agent gave them up, and their leases")
    others.check()


def test_over_tcp_a_function_that_takes_a_few_bytes_now_and_then(agent, tensors, monkeypatch, eventually):
    """Each wait is within the patience, and their sum exceeds it."""
    monkeypatch.setattr(link, "SLOWEST", 1 << 40)
    with narrow(agent) as channel:
        channel.send(LeaseRequest(URI))
        over, taken = threading.Event(), []

        def sip() -> None:
            channel.sock.setblocking(True)
            with contextlib.suppress(OSError):
                while data := channel.sock.recv(32 << 10):
                    taken.append(len(data))
                    if over.wait(0.02):
                        return

        sipping = threading.Thread(target=sip)
        sipping.start()
        try:
            eventually(lambda: agent.agent.status()[2] and free(agent), 60, "the agent gave it up")
        finally:
            over.set()
            channel.sock.shutdown(2)
            sipping.join(20)
        assert sum(taken) < sum(len(content) for _, _, content in tensors.values())
    Others(agent, tensors).check()


def test_over_the_socket_a_function_that_hears_nothing(agent, tensors, eventually):
    """A function with its weights never reads the drains that are pushed to it, until its socket is full."""
    others = Others(agent, tensors)
    with client(agent, "unix").connect() as deaf:
        deaf.send(LeaseRequest(URI))
        eventually(lambda: [model.leases for model in agent.agent.status()[2]] == [1])
        said = 0
        while said < 100_000 and (told := agent.agent.push_drain("x" * 200, 1.0)):
            said += told
        assert 100 < said < 100_000, "the agent gave it up"
        others.check()
        eventually(lambda: free(agent), 30, "its lease is free")
    others.check()
