"""Thousands of leases, opened over both transports and dropped in every way, leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from leased import soon

from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient
from cache_agent.wire.messages import Hello, Identity, LeaseRequest
from cache_agent.wire.protocol import VERSION, encode

TOKEN = "a secret of these tests"


@pytest.fixture(scope="module")
def agent(agent_process, tmp_path_factory):
    """Give an agent and its address for TCP."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with agent_process("--agent-listen", address, "--token-file", str(token)) as started:
        yield started, address, token


def anonymous(pid: int) -> int:
    """Return the process's private memory in KiB."""
    fields = Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()
    return int(fields[0])


def kinds(agent) -> Counter:
    """Count the fds of each kind."""
    return Counter(place.partition(":")[0].partition("[")[0] for place in agent.fds().values())


def knock(address: str | Path, *data: bytes) -> socket.socket:
    """Send these bytes as a client that never reads."""
    sock = socket.socket(socket.AF_INET if isinstance(address, str) else socket.AF_UNIX)
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "0")
    sock.connect((host, int(port)) if isinstance(address, str) else str(address))
    with contextlib.suppress(OSError):  # it may have been sent away in the middle
        sock.sendall(b"".join(data))
    return sock


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_leases_opened_and_dropped_leave_no_fd_no_thread_and_no_byte(
    transport, agent, tmp_path, write_checkpoint, rounds, eventually
):
    process, address, token = agent
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=len(transport))}"
    local = CacheClient(process.socket, identity=credentials.shown(token), timeout=30)
    client = CacheClient(f"tcp://{address}", identity=credentials.shown(token), timeout=30)
    client, door = (local, process.socket) if transport == "unix" else (client, address)
    hello = encode(Hello(VERSION, "x", Identity("token", TOKEN)))

    def idle() -> bool:
        (model,) = [model for model in local.status().models if model.model == uri]
        return model.leases == 0 and bool(model.revision) and kinds(process)["socket"] == 2  # that it listens on

    def drop(number: int) -> None:
        match number % 5:
            case 0:
                with client.lease(uri, deadline=soon()) as lease:
                    lease.wait_ready(soon())
            case 1:
                client.lease(uri, deadline=soon()).close()
            case 2:
                channel = client.connect()
                channel.send(LeaseRequest(uri))
                channel.close()
            case 3:
                knock(door, hello, encode(LeaseRequest(uri))).close()
            case 4:
                knock(
                    process.socket if transport == "unix" else address, hello[: 1 + number % (len(hello) - 1)]
                ).close()

    def settled() -> tuple[Counter, list[str], int]:
        used = local.status().used
        eventually(idle, 30, "neither a lease nor a connection is left")
        return kinds(process), sorted(process.memfds()), used

    for number in range(25):
        drop(number)
    before, threads = settled(), process.threads()
    own_fds, own_threads, memory = len(os.listdir("/proc/self/fd")), threading.active_count(), 0
    count = rounds(400 if transport == "unix" else 100, 10_000)
    for number in range(count):
        drop(number)
        if number == count // 2:
            memory = anonymous(process.pid)
    assert settled() == before
    assert process.threads() <= threads + 4, "the pools' own, which are few"
    assert anonymous(process.pid) < memory + 4096, "KiB; the second half of the leases took no memory"
    eventually(lambda: threading.active_count() <= own_threads, what="the client's threads have ended")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= own_fds, what="the client's fds are closed")
