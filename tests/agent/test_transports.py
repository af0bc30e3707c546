"""The transports of a lease: the same over TCP as over the node's socket, in memory of the function's own."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading

import msgspec
import pytest
from leased import contents, inodes, soon, tensors_of

from cache_agent.client.cache_client import CacheClient
from cache_agent.client.streamed import Leftover
from cache_agent.cluster.key import ClusterKey
from cache_agent.cluster.peer import Membership, Peer, PeerFailed
from cache_agent.errors import AccessDenied, AgentError, AgentUnreachable, LeaseLost
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.link import Link, dial, listen, parse_address
from cache_agent.wire.messages import Drain, Identity, RevisionNotice

URI = "s3://models/m"
TOKEN = "a secret of these tests"
KEY = ClusterKey(b"only for these tests, only for these")


@pytest.fixture(scope="module")
def tensors(random_tensors):
    return random_tensors(3, layers=3, hidden=600, vocabulary=1000)


@pytest.fixture
def agent(start_local_agent, checkpoint_files, tensors, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    origins = {URI: FakeOrigin(URI, checkpoint_files(tensors))}
    return start_local_agent(origins, token_file=tmp_path / "token", key=KEY, max_connections=64)


@pytest.fixture(params=["unix", "tcp"])
def client(request, agent):
    path = agent.socket if request.param == "unix" else f"tcp://{agent.address}"
    return CacheClient(path, name="test", identity=lambda: Identity("token", TOKEN), timeout=30)


def test_a_lease_brings_the_bytes(client, tensors):
    seen = []
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon(), lambda done, total: seen.append((done, total)))
        assert tensors_of(lease) == contents(tensors)
        assert lease.tier == "origin"
        assert {span.name for span in lease.spans} >= {"lease", "resolve", "transfer"}
        while not lease.revision:
            assert isinstance(lease.next_event(30), RevisionNotice)
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert (lease.tier, tensors_of(lease)["model.norm.weight"]) == ("dram", tensors["model.norm.weight"][2])
    assert seen == sorted(seen)


def test_where_a_file_cannot_feed_a_socket_its_pages_are_sent(client, tensors, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", refuse)
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(tensors)


def test_huge_pages_on_both_ends(start_local_agent, checkpoint_files, tensors, huge_pages, tmp_path):
    """Huge pages in the agent's memory are huge pages in the function's, too."""
    huge_pages(24)
    origins = {URI: FakeOrigin(URI, checkpoint_files(tensors))}
    (tmp_path / "token").write_text(TOKEN)
    agent = start_local_agent(origins, token_file=tmp_path / "token", key=KEY, huge_pages="always")
    client = CacheClient(f"tcp://{agent.address}", identity=lambda: Identity("token", TOKEN), timeout=30)
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert agent.agent.status()[2][0].page == lease.page == 2 << 20
        assert tensors_of(lease) == contents(tensors)


def test_the_memory_cannot_be_changed(client):
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        for fd in lease.segments:
            with pytest.raises(OSError, match=r"Bad file descriptor|not permitted"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_SHRINK
            assert seals & fcntl.F_SEAL_GROW


def test_a_lease_holds_until_it_is_closed(client, agent, eventually):
    lease = client.lease(URI, deadline=soon())
    lease.wait_ready(soon())
    assert client.status().models[0].leases == 1
    with pytest.raises(AgentError, match="held by a function"):
        client.evict(URI)
    lease.close()
    eventually(lambda: agent.agent.status()[2][0].leases == 0)
    assert client.evict(URI) > 0


def test_a_drain_reaches_the_holder(client, agent):
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert agent.agent.push_drain("update", 5.0) == 1
        found = lease.next_event(30)
        while isinstance(found, RevisionNotice):
            found = lease.next_event(30)
        assert found == Drain("update", 5.0)


def test_requests_and_errors(client, refused):
    assert client.manifest(URI).tensors
    assert client.estimate(URI).tier == "origin"
    client.prefetch(URI)
    with refused("not_found"), client.lease("s3://models/other", deadline=soon()):
        pass
    with refused("bad_uri"), client.lease("nonsense", deadline=soon()):
        pass


def test_a_function_joins_the_agent_again(client, agent, eventually):
    with client.lease(URI, deadline=soon()) as lease:
        lease.wait_ready(soon())
        lease._channel.close()  # the agent stays; only this connection is gone
        adopted = client.offer(URI, lease, deadline=soon())
        assert adopted.revision == lease.revision
        eventually(lambda: agent.agent.status()[2][0].leases == 1)


def test_an_agent_that_ends_while_bytes_are_on_the_way(client, agent):
    """Bytes that have come stay mapped; the error says to ask again."""
    gate = threading.Event()
    calls = []

    def hold(name, start, size):
        calls.append(size)
        if len(calls) > 10 and size > 1 << 20:
            gate.wait(30)

    agent.origins[URI].before_read = hold
    lease = client.lease(URI, deadline=soon())
    for connection in agent.server._snapshot():
        connection.stop()
    try:
        with pytest.raises(LeaseLost):
            lease.wait_ready(soon())
    finally:
        gate.set()
        lease.close()


# --- memory that outlives the one who fetched it ----------------------------------------------------------------------


@pytest.fixture
def remote(agent):
    return CacheClient(f"tcp://{agent.address}", identity=lambda: Identity("token", TOKEN), timeout=30)


@pytest.fixture
def sent(monkeypatch):
    """Count the bytes of weights that agents send."""
    sizes = []
    real = Link.send_file

    def send_file(link, fd, offset, size):
        sizes.append(size)
        real(link, fd, offset, size)

    monkeypatch.setattr(Link, "send_file", send_file)
    return sizes


def test_what_an_earlier_process_fetched_is_not_fetched_again(remote, agent, tensors, sent, eventually):
    with remote.lease(URI, deadline=soon()) as first:
        first.wait_ready(soon())
        assert first.fetched
        fds = [os.dup(fd) for fd in (first.manifest_fd, *first.segments)]
        wanted = inodes(first)
    eventually(lambda: [(model.leases, model.revision != "") for model in agent.agent.status()[2]] == [(0, True)])
    sent.clear()
    try:
        for _ in range(2):
            with remote.lease(URI, deadline=soon(), leftover=Leftover.of(fds)) as again:
                again.wait_ready(soon())
                assert not again.fetched
                assert (inodes(again), tensors_of(again)) == (wanted, contents(tensors))
                assert (again.tier, again.revision != "") == ("dram", True)
            eventually(lambda: agent.agent.status()[2][0].leases == 0)
        assert sent == []
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    "what", ["other files by now", "not sealed", "a segment short", "no manifest", "other layout", "sockets"]
)
def test_kept_memory_that_is_not_the_model_is_fetched_anew(
    what, remote, agent, tensors, checkpoint_files, sent, monkeypatch, eventually
):
    with remote.lease(URI, deadline=soon()) as first:
        first.wait_ready(soon())
        fds = [os.dup(fd) for fd in (first.manifest_fd, *first.segments)]
    wanted = tensors
    match what:
        case "other files by now":
            wanted = {name: (kind, shape, bytes(len(data))) for name, (kind, shape, data) in tensors.items()}
            agent.origins[URI] = FakeOrigin(URI, checkpoint_files(wanted))
            eventually(lambda: agent.agent.status()[2][0].leases == 0)
            remote.evict(URI)
        case "not sealed":
            os.close(fds[1])
            fds[1] = os.memfd_create("open")
            os.ftruncate(fds[1], first.manifest.segments[0])
        case "a segment short":
            os.close(fds.pop())
        case "no manifest":
            os.close(fds[0])
            fds[0] = os.memfd_create("empty")
        case "other layout":
            manifest = msgspec.structs.replace(first.manifest, chunk=first.manifest.chunk // 2)
            monkeypatch.setattr("cache_agent.client.streamed._leftover_manifest", lambda _: manifest)
        case "sockets":
            sock, other = socket.socketpair()
            for fd in fds:
                os.dup2(sock.fileno(), fd)
            sock.close()
            other.close()
    sent.clear()
    dropped = []
    try:
        with remote.lease(URI, deadline=soon(), leftover=Leftover.of(fds, lambda: dropped.append(what))) as again:
            assert len(dropped) == 1, "what is of no use makes room first"
            again.wait_ready(soon())
            assert again.fetched
            assert tensors_of(again) == contents(wanted)
        assert sum(sent) == sum(again.manifest.segments)
    finally:
        for fd in fds:
            os.close(fd)


# --- who is not served over TCP ---------------------------------------------------------------------------------------


def test_over_tcp_nobody_is_served_without_an_identity(start_local_agent, agent):
    with pytest.raises(AccessDenied):
        CacheClient(f"tcp://{agent.address}", timeout=5).status()
    with pytest.raises(AccessDenied):
        CacheClient(f"tcp://{agent.address}", identity=lambda: Identity("token", "wrong"), timeout=5).status()
    # An agent that asks for no token on its own socket, which has a mode, still serves nobody from outside.
    open_agent = start_local_agent()
    open_agent.client.status()
    with pytest.raises(AccessDenied):
        CacheClient(f"tcp://{open_agent.address}", timeout=5).status()


def test_both_ends_send_at_once():
    with listen("127.0.0.1:0") as server:
        called = dial(f"127.0.0.1:{server.getsockname()[1]}", 5)
        calling = Link(server.accept()[0], of_agent=True)
        for end in (called, calling):
            assert end.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            end.close()


def test_where_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AgentUnreachable):
        CacheClient(f"tcp://127.0.0.1:{port}", timeout=5).status()
    with pytest.raises(AgentUnreachable):
        CacheClient("tcp://nonsense", timeout=5).status()


def test_addresses():
    assert parse_address("a:1") == ("a", 1)
    assert parse_address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize("text", ["", "a", "a:", "a:x", "a:70000", "a:-1"])
def test_no_addresses(text):
    with pytest.raises(ValueError, match="host:port"):
        parse_address(text)


# --- agents and the cluster's key -------------------------------------------------------------------------------------


def frames(sock):
    """Yield the messages of a socket until its end."""
    buffer = b""
    while data := sock.recv(65536):
        buffer += data
        while len(buffer) >= 4 and len(buffer) >= 4 + struct.unpack("!I", buffer[:4])[0]:
            size = struct.unpack("!I", buffer[:4])[0]
            yield json.loads(buffer[4 : 4 + size])
            buffer = buffer[4 + size :]


def frame(**message):
    body = json.dumps(message).encode()
    return struct.pack("!I", len(body)) + body


def hello(nonce, client="n9"):
    return frame(type="hello", version=1, client=client, identity={"kind": "cluster", "token": nonce})


def knock(agent, *data):
    """Send each part after the answer to the one before, and return all answers until the connection ended."""
    with socket.create_connection(parse_address(agent.address), 10) as sock:
        sock.settimeout(10)
        answers = []
        messages = frames(sock)
        for part in data:
            sock.sendall(part(answers) if callable(part) else part)
            if (answer := next(messages, None)) is None:
                break
            answers.append(answer)
        return answers


def test_a_peer_with_the_key_is_served_and_one_without_is_not(agent):
    peer = Peer("n1", agent.address, Membership("n2", "", KEY))
    with pytest.raises(PeerFailed, match="is not on this node"):
        peer.describe("src-unknown")
    peer.close()
    stranger = Peer("n1", agent.address, Membership("n2", "", ClusterKey(b"another key, another cluster!!!!")))
    with pytest.raises(PeerFailed, match="key"):
        stranger.describe("src-unknown")


def test_an_agent_without_the_key_is_not_believed(start_local_agent):
    """The caller hangs up before it has sent a proof."""
    other = start_local_agent(key=ClusterKey(b"another key, another cluster!!!!"))
    with pytest.raises(PeerFailed, match="does not know this cluster's key"):
        Peer("n1", other.address, Membership("n2", "", KEY)).describe("src-1")


def test_what_was_heard_once_proves_nothing_later(agent):
    """A proof holds for one connection, whose nonce it signs."""
    nonce = "a" * 32
    heard = []

    def answer(answers):
        heard.append(KEY.proof("caller", nonce, answers[0]["nonce"], "n9", "test"))
        return frame(type="answer", proof=heard[0])

    assert [m["type"] for m in knock(agent, hello(nonce), answer)] == ["challenge", "welcome"]
    again = knock(agent, hello(nonce), frame(type="answer", proof=heard[0]))
    assert [m["type"] for m in again] == ["challenge", "error"]


def test_a_proof_sent_back_proves_nothing(agent):
    answers = knock(agent, hello("b" * 32), lambda answers: frame(type="answer", proof=answers[0]["proof"]))
    assert answers[-1]["code"] == "denied"


def test_a_nonce_that_is_no_nonce(agent):
    def answer(answers):
        return frame(type="answer", proof=KEY.proof("caller", "", answers[0]["nonce"], "n9", "test"))

    assert knock(agent, hello(""), answer)[-1]["code"] == "denied"


@pytest.mark.parametrize(
    "data",
    [
        frame(type="fetch", source="src-1", chunk=0, layout=1),
        frame(type="follow", source="src-1"),
        frame(type="describe", source="src-1"),
        frame(type="answer", proof=""),
        frame(type="lease", model=URI),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 16,
        struct.pack("!I", 1 << 31),
    ],
    ids=["fetch", "follow", "describe", "answer", "lease", "http", "ones", "length"],
)
def test_who_has_not_shown_who_it_is_gets_an_error_and_nothing_else(agent, data, eventually):
    answers = knock(agent, data)
    assert [answer["type"] for answer in answers] == ["error"]
    eventually(lambda: not agent.server._snapshot())


def test_functions_cannot_ask_for_what_agents_may(agent):
    greeting = frame(type="hello", version=1, client="f", identity={"kind": "token", "token": TOKEN})
    answers = knock(agent, greeting, frame(type="fetch", source="src-1", chunk=0, layout=1))
    assert [answer["type"] for answer in answers] == ["welcome", "error"]


def test_who_is_slow_to_say_who_it_is_is_sent_away(agent, monkeypatch, eventually):
    monkeypatch.setattr("cache_agent.serving.connection._HELLO_SECONDS", 0.2)
    with socket.create_connection(parse_address(agent.address), 10) as sock:
        sock.settimeout(10)
        sock.sendall(hello("c" * 32)[:6])
        assert [message["code"] for message in frames(sock)] == ["protocol"]
    with socket.create_connection(parse_address(agent.address), 10) as sock:
        sock.settimeout(10)
        sock.sendall(hello("c" * 32))
        assert [message["type"] for message in frames(sock)] == ["challenge", "error"]
    eventually(lambda: not agent.server._snapshot())


def test_strangers_cannot_take_the_nodes_own_connections(agent):
    """Half of all connections are reserved for the socket."""
    held = [socket.create_connection(parse_address(agent.address), 10) for _ in range(40)]
    try:
        assert CacheClient(agent.socket, identity=lambda: Identity("token", TOKEN), timeout=10).status().node == "test"
    finally:
        for sock in held:
            sock.close()


def test_a_function_imports_no_more_for_tcp_than_it_needs():
    code = (
        "import sys, cache_agent.client.cache_client;"
        "print(sorted(m for m in sys.modules if m.startswith('cache_agent')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cache_agent.cluster.key" not in found
    assert "cache_agent.client.streamed" not in found
